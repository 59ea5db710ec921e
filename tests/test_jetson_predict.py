"""The Jetson runner predicts: with an engine that fits, two images under way, and a row for every file."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from jetson_device import PACKAGE, SIZE, TENSORS, Device, write_bundle
from PIL import Image

from uad_plugins.evaluation.overlays import save_overlay
from uad_plugins.evaluation.predict import find_images
from uad_plugins.imaging import read_rgb

NO_IMAGE = "no image to predict; PNG, JPEG, BMP, TIFF and WebP are read, heat maps only where they are named"

TENSOR_FUNCTIONS = (
    *(f"ICudaEngine.{name}" for name in ("num_io_tensors", "get_tensor_name", "get_tensor_shape", "get_tensor_dtype")),
    *(f"IExecutionContext.{name}" for name in ("set_tensor_address", "execute_async_v3")),
)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture
def photos(tmp_path):
    """Ten pictures at the network's size, each of one grey: brighter ones score higher."""
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        Image.new("RGB", SIZE[::-1], (25 * number,) * 3).save(path)
    return paths


def expected_score(grey):
    return float(((grey / 255 - MEAN) / STD).mean())


def other_tensorrt(device):
    device.trt.__version__ = "10.99.0"


def other_gpu(device):
    device.cuda.name = "Xavier"


def other_capability(device):
    device.cuda.capability = (7, 2)


def other_onnx(device):
    write_bundle(device.bundle, onnx=b"other")


def changed_engine(device):
    (device.bundle / "engine" / "model.engine").write_bytes(b"engin")


def no_engine(device):
    (device.bundle / "engine" / "model.engine").unlink()


def damaged_sidecar(device):
    (device.bundle / "engine" / "model.engine.json").write_text("{")


def sidecar_without_options(device):
    path = device.bundle / "engine" / "model.engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "options": {"speed": 9}}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_tensorrt, "tensorrt was 1"),
        (other_gpu, "gpu was Orin, is Xavier"),
        (other_capability, "compute_capability was 8.7, is 7.2"),
        (other_onnx, "onnx_sha256 was"),
        (changed_engine, "the file of the engine has changed"),
        (no_engine, "there is none yet"),
        (damaged_sidecar, "there is none yet"),
        (sidecar_without_options, "options was"),
    ],
)
@pytest.mark.parametrize("command", ["build", "predict"])
def test_an_engine_that_does_not_fit_is_built_anew(tmp_path, photos, change, reason, command):
    device = Device("10.3", write_bundle(tmp_path / "bundle"))
    device.run("build")
    change(device)
    words = ["build"] if command == "build" else ["predict", str(photos[0])]
    done = device.run(*words)
    assert done.status == 0
    assert f"building the engine ({reason}" in done.err
    assert len(device.trt.called("Builder.build_serialized_network")) == 2
    assert "building" not in device.run(*words).err


def test_predicting_keeps_the_options_that_the_engine_was_built_with(tmp_path, photos):
    device = Device("10.3", write_bundle(tmp_path / "bundle"), dla_cores=2)
    device.run("build", "--dla-core", "1")
    assert device.run("predict", str(photos[0])).status == 0
    assert len(device.trt.called("Builder.build_serialized_network")) == 1
    assert device.trt.called("Runtime.DLA_core") == [(1,)]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("build", "could not build an engine; its messages are above"),
        ("load", "cannot load it; build it anew: runner.py build --force"),
        ("context", "TensorRT could not make an execution context"),
        ("run", "TensorRT could not run the engine"),
        ("address", "TensorRT refuses the memory of tensor"),
    ],
)
def test_what_tensorrt_refuses_is_one_line(device, photos, fails, message):
    device.fails = (fails,)
    done = device.run("predict", str(photos[0]))
    assert done.status == 2
    assert done.out == ""
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_scores_come_in_order_with_threshold_and_verdict(device, photos):
    done = device.run("predict", str(photos[0].parent))
    assert done.status == 0
    assert [row["path"] for row in done.rows] == [str(path) for path in photos]
    scores = [expected_score(25 * number) for number in range(10)]
    np.testing.assert_allclose([row["score"] for row in done.rows], scores, rtol=1e-4, atol=1e-5)
    assert [row["verdict"] for row in done.rows] == ["anomalous" if score > 0.5 else "normal" for score in scores]
    assert {(row["threshold"], row["category"], row["map"], row["error"]) for row in done.rows} == {(0.5, None, None, None)}


def test_a_score_at_its_threshold_is_normal_and_above_it_anomalous(tmp_path, photos):
    device = Device("10.3", write_bundle(tmp_path / "bundle"))
    (row,) = device.run("predict", str(photos[7])).rows
    categories = {"at": {"value": row["score"]}, "below": {"value": float(np.nextafter(row["score"], -np.inf))}}
    write_bundle(device.bundle, thresholds={"pooled": {"value": 0.0}, "categories": categories})
    judged = [device.run("predict", str(photos[7]), "--category", name).rows[0]["verdict"] for name in categories]
    assert judged == ["normal", "anomalous"]


@contextlib.contextmanager
def opened(device):
    """Yield a session on the device and its bundle, and the module that predicts."""
    with device.installed():
        names = ("bundle", "devices", "engines", "inference", "prediction")
        reading, devices, engines, inference, prediction = (importlib.import_module(f"{PACKAGE}.{name}") for name in names)
        bundle, files = reading.read_bundle(device.bundle), engines.EngineFiles(device.bundle / "engine")
        with devices.gpu() as found:
            engines.ensure_engine(bundle, files, found, lambda message: None)
            with inference.Session(engines.load_engine(files), bundle) as session:
                yield session, bundle, prediction


def test_what_was_fetched_stays_when_the_next_image_comes(device):
    with opened(device) as (session, _, _):
        lane = session.lanes[0]
        lane.submit(lambda target: target.fill(1))
        score, anomaly_map = lane.fetch()
        lane.submit(lambda target: target.fill(9))
        assert lane.fetch()[0] == 9
    assert score == 1
    np.testing.assert_array_equal(anomaly_map, 1 + np.arange(12).reshape(3, 4))
    assert anomaly_map.dtype == np.float32


def test_a_bad_file_is_told_before_the_images_behind_it_are_run(device, photos):
    with opened(device) as (session, bundle, prediction):
        rows = prediction.predict(session, bundle, ["missing.png", *map(str, photos)])
        assert next(rows)["error"] == "no such file"
        assert ("execute", 0) not in device.cuda.log
        assert len(list(rows)) == 10


@pytest.mark.parametrize(("category", "verdict"), [("bolt", "anomalous"), ("nut", "no threshold")])
def test_a_category_has_its_own_threshold(tmp_path, photos, category, verdict):
    device = Device("10.3", write_bundle(tmp_path / "bundle"))
    (row,) = device.run("predict", str(photos[6]), "--category", category).rows
    assert (row["verdict"], row["category"]) == (verdict, category)


def test_an_unknown_category_is_refused_before_anything_is_built(tmp_path, photos):
    device = Device("10.3", write_bundle(tmp_path / "bundle"))
    done = device.run("predict", str(photos[0]), "--category", "gear")
    assert (done.status, done.err) == (2, "error: category 'gear' is not in this bundle; it knows: bolt, nut\n")
    assert device.trt.calls == []


def test_bad_files_are_rows_with_an_error_between_the_good_ones(device, photos):
    photos[0].write_bytes(b"")
    for number in (3, 4, 5):
        photos[number].write_text("no picture " * 30)
    done = device.run("predict", *map(str, photos), "missing.png")
    assert done.status == 1
    rows = done.rows
    errors = ["empty file", *["not an image of a known format"] * 3, "no such file"]
    assert [row["error"] for row in rows if row["error"]] == errors
    assert [row["path"] for row in rows] == [*map(str, photos), "missing.png"]
    assert all((row["score"] is None) == (row["verdict"] == "error") == (row["error"] is not None) for row in rows)
    assert done.err.endswith("5 of 11 images could not be scored\n")


def test_bad_files_alone_need_no_device(device, tmp_path):
    done = device.run("predict", str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert [row["error"] for row in done.rows] == ["no such file"] * 2
    assert ("execute", 0) not in device.cuda.log


def test_a_score_that_is_no_number_is_an_error(tmp_path, photos):
    preprocessing = {"mean": [0, 0, 0], "std": [1e-5, 1, 1], "resize": "bilinear", "antialias": True, "color": "RGB"}
    device = Device("10.3", write_bundle(tmp_path / "bundle", preprocessing=preprocessing), dtype="HALF")
    with np.errstate(over="ignore"):
        done = device.run("predict", str(photos[0]), str(photos[9]))
    assert [row["error"] for row in done.rows] == [None, "the model's score is not a finite number"]
    assert done.status == 1


def test_an_image_is_copied_run_and_copied_back_on_its_own_stream(device, photos):
    device.run("predict", *map(str, photos[:4]))
    started = device.cuda.log.index(("to device", 0))
    steps = ["to device", "execute", "to host", "to host"]
    image = {lane: [(step, lane) for step in steps] for lane in (0, 1)}
    wait = {lane: [("synchronize", lane)] for lane in (0, 1)}
    # The next image is always under way before the one before it is waited for.
    expected = image[0] + image[1] + wait[0] + image[0] + wait[1] + image[1] + wait[0] + wait[1]
    # Closing waits for both once more.
    assert device.cuda.log[started:] == [*expected, *wait[0], *wait[1]]


def test_memory_is_allocated_once_and_given_back(device, photos):
    device.run("predict", *map(str, photos))
    first = device.cuda.log.index(("to device", 0))
    allocated = [what for what, _ in device.cuda.log if what in {"pin", "allocate"}]
    assert sorted(allocated) == ["allocate"] * 6 + ["pin"] * 6
    assert not {"pin", "allocate"} & {what for what, _ in device.cuda.log[first:]}
    assert device.cuda.memory == {}
    assert device.cuda.contexts == 0


def test_memory_is_given_back_after_an_error(device, photos):
    device.fails = ("run",)
    assert device.run("predict", str(photos[0])).status == 2
    assert device.cuda.memory == {}
    assert device.cuda.contexts == 0


def test_before_8_5_the_numbered_bindings_do_the_same(tmp_path, photos):
    device = Device("8.6", write_bundle(tmp_path / "bundle"), without=TENSOR_FUNCTIONS)
    done = device.run("predict", *map(str, photos))
    np.testing.assert_allclose([row["score"] for row in done.rows], [expected_score(25 * n) for n in range(10)], atol=1e-4)
    assert len(device.trt.called("IExecutionContext.execute_async_v2")) == 10


@pytest.mark.parametrize("version", ["8.6", "10.3"])
def test_the_tensor_functions_are_preferred(tmp_path, photos, version):
    device = Device(version, write_bundle(tmp_path / "bundle"))
    device.run("predict", str(photos[0]))
    assert not [name for name, _ in device.trt.calls if "binding" in name or name.endswith("_v2")]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_score_may_have_any_number_of_dimensions(tmp_path, photos, shape):
    device = Device("10.3", write_bundle(tmp_path / "bundle"), tensors={**TENSORS, "score": shape})
    (row,) = device.run("predict", str(photos[5])).rows
    assert row["score"] == pytest.approx(expected_score(125), rel=1e-4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**TENSORS, "input": (1, 3, 9, 9)}, "the engine's input is (1, 3, 9, 9), the bundle's (1, 3, 6, 8)"),
        ({**TENSORS, "score": (1, 2)}, "not one score and one map"),
        ({**TENSORS, "more": (1,)}, "the engine has tensors that the bundle does not name: more"),
        ({"input": TENSORS["input"], "map": TENSORS["map"]}, "the engine has no tensor 'score', only: input, map"),
    ],
)
def test_an_engine_of_other_tensors_is_refused(tmp_path, photos, tensors, message):
    device = Device("10.3", write_bundle(tmp_path / "bundle"), tensors=tensors)
    done = device.run("predict", str(photos[0]))
    assert done.status == 2
    assert message in done.err.splitlines()[-1]


def test_tensors_of_another_type_are_refused(tmp_path, photos):
    device = Device("10.3", write_bundle(tmp_path / "bundle"), dtype="INT8")
    assert "this runner knows float32 and float16" in device.run("predict", str(photos[0])).err


def test_half_precision_outputs_are_read_too(tmp_path, photos):
    device = Device("11.4", write_bundle(tmp_path / "bundle"), dtype="HALF")
    (row,) = device.run("predict", str(photos[9])).rows
    assert row["score"] == pytest.approx(expected_score(225), rel=2e-3)


def test_heat_maps_are_written_at_the_size_of_the_source(tmp_path, photos):
    Image.new("RGB", (40, 30), (90, 90, 90)).save(photos[1])
    Image.new("RGB", (40, 30), (200, 90, 90)).save(photos[1].with_suffix(".jpg"))
    device = Device("10.3", write_bundle(tmp_path / "bundle"))
    done = device.run("predict", str(photos[1].parent), "--out", str(tmp_path / "maps"))
    maps = [Path(row["map"]) for row in done.rows]
    assert [path.name for path in maps[:4]] == ["0_map.png", "1_map.png", "1_png_map.png", "2_map.png"]
    assert len(set(maps)) == 11
    shown = [np.asarray(read_rgb(path)).astype(int) for path in maps[:3]]
    assert [picture.shape for picture in shown] == [(6, 8, 3), (30, 40, 3), (30, 40, 3)]
    # The map grows from its first to its last pixel, so the picture must differ more and more from its source.
    difference = np.abs(shown[2] - np.asarray(read_rgb(photos[1])))
    assert difference[-1, -1].sum() > difference[0, 0].sum()


def test_heat_maps_are_no_images_here_or_there(tmp_path, photos):
    device = Device("10.3", write_bundle(tmp_path / "bundle"))
    folder = photos[0].parent
    first = device.run("predict", str(folder), "--out", str(folder)).rows
    second = device.run("predict", str(folder), "--out", str(folder)).rows
    assert len(first) == 10
    assert [row["path"] for row in second] == [row["path"] for row in first]
    # uadx knows those of the device; typed by its name, one is an image.
    assert find_images([str(folder)]) == [row["path"] for row in first]
    assert len(device.run("predict", first[0]["map"]).rows) == 1
    ours = folder / "ours.png"
    save_overlay(Image.new("RGB", (8, 6)), ours)
    assert len(device.run("predict", str(folder)).rows) == 10


def test_a_folder_that_cannot_be_listed_gets_an_error_and_the_rest_go_on(device, photos, closed):
    inner, alone = closed(photos[0].parent / "lost+found"), closed(photos[0].parents[1] / "alone")
    done = device.run("predict", str(photos[0].parent), str(alone))
    assert done.status == 1, done.err
    assert [row["path"] for row in done.rows] == [*map(str, photos), str(alone)]
    assert [row["error"] for row in done.rows] == [None] * 10 + ["is a folder, not an image"]
    assert str(inner) not in done.out


def test_an_error_of_the_system_is_one_line(device, photos, monkeypatch):
    def refusing(path):
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(os, "scandir", refusing)
    done = device.run("predict", str(photos[0].parent))
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: {photos[0].parent}: Input/output error\n"


def test_an_empty_folder_is_refused(device, tmp_path):
    (tmp_path / "empty").mkdir()
    done = device.run("predict", str(tmp_path / "empty"))
    assert (done.status, done.err) == (2, f"error: {NO_IMAGE}\n")
