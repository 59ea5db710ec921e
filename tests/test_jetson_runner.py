"""The runner for Jetson, against TensorRT's real classes of each version without what they do."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jetson_device import HEAD, NETWORK, PACKAGE, SIZE, TENSORS, Device, Layer, write_bundle
from PIL import Image

from uad_plugins.imaging import read_rgb

ROOT = Path(__file__).parents[1]
VERSIONS = ["8.6", "10.3", "10.14", "11.4"]
WEAKLY_TYPED = VERSIONS[:-1]
TENSOR_FUNCTIONS = (
    *(f"ICudaEngine.{name}" for name in ("num_io_tensors", "get_tensor_name", "get_tensor_shape", "get_tensor_dtype")),
    *(f"IExecutionContext.{name}" for name in ("set_tensor_address", "execute_async_v3")),
)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(params=VERSIONS)
def device(request, tmp_path):
    return Device(request.param, write_bundle(tmp_path / "bundle"))


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


def test_the_flags_are_those_that_the_version_has(device):
    assert device.run("build").status == 0
    expected = [] if device.version == "11.4" else ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    assert device.flags() == expected


def test_the_network_is_strongly_typed_in_11_and_of_explicit_batch_before(device):
    device.run("build")
    ((flags,),) = device.trt.called("Builder.create_network")
    kinds = device.trt.NetworkDefinitionCreationFlag
    assert flags == 1 << (kinds.STRONGLY_TYPED if device.version == "11.4" else kinds.EXPLICIT_BATCH).value


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_the_head_alone_is_kept_in_fp32(tmp_path, version):
    device = Device(version, write_bundle(tmp_path / "bundle"))
    device.run("build")
    kept = [layer.state for layer in device._layers if hasattr(layer.state, "properties")]
    assert [state.name for state in kept] == HEAD
    assert all(state.properties == {"precision": device.trt.float32} for state in kept)
    assert device.trt.called("ILayer.set_output_type") == [(0, device.trt.float32)] * len(HEAD)


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_a_network_without_quantization_gets_no_int8_and_the_same_head(tmp_path, version):
    plain = [layer for layer in NETWORK if layer.kind not in {"QUANTIZE", "DEQUANTIZE"}]
    names = {"dq0": "input", "dq1": "relu0"}
    plain = [Layer(x.name, x.kind, tuple(names.get(n, n) for n in x.inputs), x.outputs, x.channels, x.dtype) for x in plain]
    device = Device(version, write_bundle(tmp_path / "bundle"), network=plain)
    device.run("build")
    assert device.flags() == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert [layer.state.name for layer in device._layers if hasattr(layer.state, "properties")] == HEAD


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_a_difference_of_features_is_head_though_its_inputs_are_not(tmp_path, version):
    network = [
        Layer("teacher", "CONVOLUTION", ("input",), ("teacher",)),
        Layer("student", "CONVOLUTION", ("input",), ("student",)),
        Layer("subtract", "ELEMENTWISE", ("teacher", "student"), ("subtract",)),
        Layer("square", "ELEMENTWISE", ("subtract", "subtract"), ("map",)),
        Layer("largest", "REDUCE", ("map",), ("score",)),
    ]
    device = Device(version, write_bundle(tmp_path / "bundle"), network=network)
    device.run("build")
    kept = [layer.state.name for layer in device._layers if hasattr(layer.state, "properties")]
    assert kept == ["subtract", "square", "largest"]


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_fp16_can_be_left_out(tmp_path, version):
    device = Device(version, write_bundle(tmp_path / "bundle"))
    device.run("build", "--no-fp16")
    assert device.flags() == ["INT8"]
    assert device.trt.called("ILayer.set_output_type") == []


def test_the_workspace_is_limited(device):
    device.run("build", "--workspace", "256")
    assert device.trt.called("IBuilderConfig.set_memory_pool_limit") == [(device.trt.MemoryPoolType.WORKSPACE, 256 << 20)]


def test_an_engine_that_fits_is_not_built_again(device):
    assert device.run("build").status == 0
    assert (device.bundle / "engine" / "model.engine").read_bytes() == b"engine"
    again = device.run("build")
    assert again.status == 0
    assert "stays as it is" in again.err
    assert len(device.trt.called("Builder.build_serialized_network")) == 1
    device.run("build", "--force")
    assert len(device.trt.called("Builder.build_serialized_network")) == 2


def test_the_sidecar_says_what_the_engine_was_built_from(device):
    device.run("build")
    sidecar = json.loads((device.bundle / "engine" / "model.engine.json").read_text())
    assert sidecar.pop("trtexec").startswith("trtexec --onnx=")
    assert {len(sidecar.pop(key)) for key in ("onnx_sha256", "engine_sha256")} == {64}
    assert sidecar == {
        "schema": "uadx.engine/1",
        "tensorrt": device.trt.__version__,
        "gpu": "Orin",
        "compute_capability": "8.7",
        "options": {"fp16": True, "workspace_mib": 1024, "dla_core": None},
    }
    assert {path.name for path in (device.bundle / "engine").iterdir()} == {
        "model.engine",
        "model.engine.json",
        f"timing-{device.trt.__version__}.cache",
    }


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


def test_timings_of_an_earlier_build_are_used(device):
    device.run("build")
    device.run("build", "--force")
    assert device.trt.called("IBuilderConfig.create_timing_cache") == [(b"",), (b"timings",)]
    assert device.trt.called("ITimingCache.serialize") == [(), ()]


def test_timings_that_do_not_fit_are_replaced(device):
    cache = device.bundle / "engine" / f"timing-{device.trt.__version__}.cache"
    cache.parent.mkdir()
    cache.write_bytes(b"of another device")
    done = device.run("build")
    assert f"note: {cache} is of another device or version" in done.err
    assert device.trt.called("IBuilderConfig.create_timing_cache") == [(b"of another device",), (b"",)]
    assert cache.read_bytes() == b"timings"


def test_dla_takes_what_it_can_and_the_gpu_the_rest(tmp_path):
    for version in VERSIONS:
        device = Device(version, write_bundle(tmp_path / version), dla_cores=1)
        done = device.run("build", "--dla-core", "0")
        assert done.status == 0
        assert "DLA takes no quantization nodes" in done.err
        assert "GPU_FALLBACK" in device.flags()
        assert device.trt.called("IBuilderConfig.default_device_type") == [(device.trt.DeviceType.DLA,)]
        assert device.trt.called("IBuilderConfig.DLA_core") == [(0,)]
        assert "--useDLACore=0 --allowGPUFallback" in done.err


def test_a_dla_core_that_is_not_there_is_refused(device):
    done = device.run("build", "--dla-core", "1")
    assert done.status == 2
    assert done.err.splitlines()[-1] == "error: no DLA core 1: this device has 0"


def test_dla_without_half_precision_is_refused(tmp_path):
    device = Device("8.6", write_bundle(tmp_path / "bundle"), dla_cores=2)
    done = device.run("build", "--dla-core", "1", "--no-fp16")
    assert done.status == 2
    assert done.err.endswith("error: DLA computes in FP16 or INT8: --dla-core and --no-fp16 exclude each other\n")


def test_the_equal_trtexec_line(device):
    done = device.run("build", "--workspace", "512")
    words = done.err.partition(f"the same with trtexec, in {device.bundle}: ")[2].split()
    expected = [
        "trtexec",
        "--onnx=model.onnx",
        "--saveEngine=engine/model.engine",
        f"--timingCacheFile=engine/timing-{device.trt.__version__}.cache",
        "--memPoolSize=workspace:512",
    ]
    if device.version != "11.4":
        listed = ",".join(f"{name}:fp32" for name in HEAD)
        expected += ["--int8", "--fp16", "--precisionConstraints=obey"]
        expected += [f"--layerPrecisions={listed}", f"--layerOutputTypes={listed}"]
    assert words == [*expected, "--skipInference"]
    sidecar = json.loads((device.bundle / "engine" / "model.engine.json").read_text())
    assert sidecar["trtexec"].split() == words


def test_before_8_6_trtexec_calls_it_build_only(tmp_path):
    device = Device("8.6", write_bundle(tmp_path / "bundle"))
    device.trt.__version__ = "8.5.2.2"
    assert device.run("build").err.endswith(" --buildOnly\n")


def test_errors_of_the_parser_name_the_nodes(tmp_path):
    helper = pytest.importorskip("onnx").helper
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="/a/Relu"), helper.make_node("Nms", ["y"], ["z"], name="/b/Nms")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [])).SerializeToString()
    for version in VERSIONS:
        errors = [(1, "/b/Nms", "Nms", "In node 1:\n UNSUPPORTED_NODE"), (7, "", "", "INVALID_GRAPH")]
        device = Device(version, write_bundle(tmp_path / version, onnx=model), errors=errors)
        done = device.run("build")
        assert done.status == 2
        assert done.err.splitlines()[-1] == (
            f"error: {device.bundle / 'model.onnx'}: TensorRT {device.trt.__version__} cannot take this network: "
            "node /b/Nms (Nms): In node 1: UNSUPPORTED_NODE; node number 7: INVALID_GRAPH"
        )
        assert not (device.bundle / "engine").exists()


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


def test_no_gpu_is_one_line(device):
    device.cuda.fails = True
    done = device.run("build")
    assert (done.status, done.err) == (2, "error: CUDA: cuInit failed: no CUDA-capable device is detected\n")


@pytest.mark.parametrize("changed", [b"onnX", b"onn"])
def test_a_changed_onnx_file_is_refused_before_tensorrt_sees_it(device, changed):
    (device.bundle / "model.onnx").write_bytes(changed)
    done = device.run("build")
    assert done.status == 2
    assert "model.onnx: is not the file that was bundled" in done.err
    assert device.trt.calls == []


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


def test_an_empty_folder_is_refused(device, tmp_path):
    (tmp_path / "empty").mkdir()
    done = device.run("predict", str(tmp_path / "empty"))
    assert (done.status, done.err) == (2, "error: no image to predict; PNG, JPEG, BMP, TIFF and WebP are read\n")


def test_the_benchmark_is_one_document(device, tmp_path):
    done = device.run("benchmark", "--warm-up", "3", "--images", "10", "--out", str(tmp_path / "b.json"))
    assert done.status == 0
    document = json.loads(done.out)
    assert document == json.loads((tmp_path / "b.json").read_text())
    assert (document["images"], document["gpu"], document["tensorrt"]) == (10, "Orin", device.trt.__version__)
    latency = document["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    assert document["memory_mib"]["device_used"] == 5 << 10
    assert document["memory_mib"]["process_peak"] > 10
    assert document["images_per_s"] > 0
    # The first result, the warm-up and both measurements; each image is run once and waited for once.
    ran = [lane for what, lane in device.cuda.log if what == "execute"]
    assert (len(ran), ran[14:]) == (24, [0, 1] * 5)
    assert [what for what, _ in device.cuda.log].count("synchronize") == 24 + 2


def test_the_throughput_keeps_two_images_under_way(device):
    device.run("benchmark", "--warm-up", "1", "--images", "4")
    log = [entry for entry in device.cuda.log if entry[0] in {"execute", "synchronize"}][2 * (1 + 1 + 4) :]
    run, wait = "execute", "synchronize"
    assert log[:8] == [(run, 0), (run, 1), (wait, 0), (run, 0), (wait, 1), (run, 1), (wait, 0), (wait, 1)]


def test_the_engine_can_lie_elsewhere(device, tmp_path):
    device.run("build", "--engines", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model.engine").is_file()
    assert not (device.bundle / "engine").exists()
    line = json.loads((tmp_path / "elsewhere" / "model.engine.json").read_text())["trtexec"]
    assert f"--saveEngine={tmp_path.resolve() / 'elsewhere' / 'model.engine'}" in line.split()


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom jetson_device import PACKAGE, Device\n"
        f"device = Device('10.3', Path({str(bundle)!r}))\nsys.stdin.read()\n"
        "with device.installed():\n"
        "    from uad_plugins.deployment.jetson.uadx_jetson.commands import main\n"
        f"    sys.exit(main(['predict', '--bundle', {str(bundle)!r}, 'missing.png']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, ROOT]))}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        complaint = process.stderr.read().decode()
    assert process.returncode == 141
    assert "Traceback" not in complaint
    assert "BrokenPipe" not in complaint


def test_the_copied_files_run_alone_and_say_what_is_missing(tmp_path):
    source = ROOT / "uad_plugins" / "deployment" / "jetson"
    bundle = write_bundle(tmp_path / "bundle")
    shutil.copy(source / "runner.py", bundle)
    shutil.copytree(source / "uadx_jetson", bundle / "uadx_jetson", ignore=shutil.ignore_patterns("__pycache__"))
    # Isolated from this installation; tensorrt is shadowed, for a machine that has it.
    (bundle / "tensorrt.py").write_text("raise ImportError('none here')")
    (bundle / "pycuda").mkdir()
    (bundle / "pycuda" / "driver.py").touch()
    done = subprocess.run([sys.executable, "runner.py", "build"], cwd=bundle, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: tensorrt and pycuda are needed on the device: none here\n"
    helped = subprocess.run([sys.executable, "runner.py", "--help"], cwd=bundle, capture_output=True, text=True)
    assert "build | predict | benchmark" in helped.stdout
