"""The verb: from a run to a quantized model, judged, and read by later verbs like a run."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nncf
import numpy as np
import onnx
import pytest
from networks import MEAN, STD, calibration, core, noise, quantized
from runs import small_run
from typer.testing import CliRunner
from uadx.app import app

from uad_plugins import quickstart
from uad_plugins.artifacts import Run, read_json, write_json
from uad_plugins.config import model_plugin
from uad_plugins.data.layouts import scan
from uad_plugins.data.products.synthesis import synthesize
from uad_plugins.data.samples import Sample, SampleTable, hold_out
from uad_plugins.deployment.bundle import Bundle
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.evaluation.thresholds import thresholds_from_samples
from uad_plugins.hookspecs import QuantizationResult, QuantizerPlugin
from uad_plugins.imaging import read_rgb, resize_rgb
from uad_plugins.quantization.calibration import SOURCES
from uad_plugins.quantization.export import save_onnx, to_onnx
from uad_plugins.quantization.openvino_int8 import chosen_fix
from uad_plugins.quantization.options import OpenvinoOptions
from uad_plugins.quantization.quantize import Order, quantize
from uad_plugins.quantization.referee import Distance, Limits, compare, rank_correlation
from uad_plugins.quantization.samples import samples_of
from uad_plugins.quantization.torch_quantization import load_quantized, save_quantized
from uad_plugins.quantized import Quantized
from uad_plugins.runtime.exported import normalise
from uad_plugins.testing.common import registered


@pytest.fixture(scope="session")
def small(products, tmp_path_factory):
    """A run of STFPM on two layers."""
    out = tmp_path_factory.mktemp("small") / "run"
    small_run(products, out, {"model": {"layers": ["layer1", "layer2"]}})
    return out


@pytest.fixture(scope="session")
def restored(tmp_path_factory):
    """A run of Reverse Distillation that tells good from defective, and its data."""
    out = tmp_path_factory.mktemp("restored") / "run"
    data = synthesize(out.parent / "products", side=64, train=16, test=12)
    over = {
        "model": {"name": "reverse_distillation"},
        "optimizer": {"name": "adam", "lr": 5e-3},
        "trainer": {"max_epochs": 8},
    }
    small_run(data, out, over)
    return out, data


@pytest.fixture(scope="session")
def int8(small, products, tmp_path_factory):
    """It in INT8 for OpenVINO, measured on the labelled test split. Not to be changed."""
    out = tmp_path_factory.mktemp("int8") / "q"
    manifest = quantize(Order(small, out, "openvino-int8", samples=9, data=str(products)))
    return out, manifest


@pytest.fixture
def table(products):
    return hold_out(scan(products), 0.1, 0)


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def test_the_manifest_says_everything(int8, small):
    out, manifest = int8
    stored = json.loads((out / "quantized.json").read_text())
    assert stored["schema"] == "uadx.quantized/1"
    assert stored["status"] == "finished"
    assert stored["precision"] == "int8"
    assert stored["profile"] == "openvino"
    assert stored["calibration"]["images"] == {"connector": 3, "fabric": 3, "washer": 3}
    assert stored["source"]["checkpoint_sha256"] == Run(small).manifest().checkpoint_sha256
    assert set(stored["files"]) == {"model.xml", "model.bin"}
    assert {path.name for path in out.iterdir()} == {*stored["files"], "quantized.json", "thresholds.json"}
    assert not any(stored["audit"]["model.xml"].values())
    assert set(stored["auroc"]) == {"connector", "fabric", "washer", "mean"}
    for values in stored["auroc"].values():
        assert values["image_auroc"]["drop"] == pytest.approx(
            values["image_auroc"]["fp32"] - values["image_auroc"]["quantized"]
        )
    assert stored["size"]["openvino"]["ratio"] < 0.3
    placed = stored["placement"]["model.xml"]
    assert placed == {"convolutions": 20, "quantized": 20, "in_float": [], "activations": placed["activations"]}
    assert placed["activations"] > 10
    assert "nncf" in stored["versions"]
    assert manifest.agreement["openvino model.xml"]["map_rank"] > 0.9


def test_later_verbs_read_it_like_a_run(int8, products, tmp_path):
    out, manifest = int8
    shutil.copytree(out, tmp_path / "q")
    done = command("evaluate", tmp_path / "q", products, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["detector"]["engine"] == "openvino"
    assert report["mean"]["image_auroc"] == pytest.approx(manifest.auroc["mean"]["image_auroc"]["quantized"])
    done = command("predict", tmp_path / "q", products / "washer" / "test" / "good", "--json", "--category", "washer")
    assert done.exit_code == 0, done.stderr
    before = read_json(tmp_path / "q" / "thresholds.json")
    write_json(tmp_path / "q" / "thresholds.json", {**before, "source": "changed"})
    done = command("thresholds", tmp_path / "q", products)
    assert done.exit_code == 0, done.stderr
    assert read_json(tmp_path / "q" / "thresholds.json") == before


@pytest.mark.parametrize("backend", ["fp32", "fp16", "tensorrt-int8"])
def test_onnx_runs_in_both_engines(backend, small, products, tmp_path):
    manifest = quantize(Order(small, tmp_path / "q", backend, samples=6))
    assert manifest.status == "finished"
    images = np.stack([resize_rgb(read_rgb(path), (64, 64)) for path in scan(products).paths][:2])
    with (
        open_detector(small) as run,
        open_detector(tmp_path / "q", "onnxruntime") as one,
        open_detector(tmp_path / "q", "openvino") as two,
    ):
        expected, (scores, maps), (others, other_maps) = run.infer(images)[1], one.infer(images), two.infer(images)
    assert scores.shape == others.shape == (2,)
    tolerance = {"fp32": 1e-4, "fp16": 0.01, "tensorrt-int8": 0.2}[backend]
    assert np.linalg.norm(maps - expected) / np.linalg.norm(expected) < tolerance
    assert np.linalg.norm(other_maps - maps) / np.linalg.norm(maps) < 0.03
    if backend == "tensorrt-int8":
        assert manifest.placement["model.onnx"]["quantized"] == manifest.placement["model.onnx"]["convolutions"] == 20
        assert manifest.size["engine"]["ratio"] < 0.3
    else:
        assert manifest.placement == {}
        assert "engine" not in manifest.size
    assert manifest.size["onnx"]["ratio"] == pytest.approx(0.5 if backend == "fp16" else 1.0, abs=0.03)


@pytest.mark.parametrize("source", SOURCES)
def test_every_calibration_works(source, small, tmp_path):
    options = {"weights": "int8"} if source == "mixed" else {}
    backend = "tensorrt-int8" if source == "mixed" else "openvino-int8"
    manifest = quantize(Order(small, tmp_path / "q", backend, calibration=source, samples=8, options=options))
    assert manifest.calibration["source"] == source
    assert manifest.calibration["noise"] == {"dataset": 0, "random-normal": 8, "mixed": 4}[source]
    assert next(iter(manifest.agreement.values()))["map_rank"] > 0.8
    if source == "mixed":
        # Small in the file already: nothing else is to be said.
        assert manifest.size["onnx"]["ratio"] < 0.3
        assert "engine" not in manifest.size


@pytest.mark.parametrize(
    ("backend", "source"),
    [
        ("openvino-int8", "dataset"),
        *(
            pytest.param(backend, source, marks=pytest.mark.slow)
            for backend, source in (
                ("openvino-int8", "random-normal"),
                ("tensorrt-int8", "dataset"),
                ("tensorrt-int8", "random-normal"),
                ("nncf-qat", "dataset"),
                ("nncf-qat", "random-normal"),
            )
        ),
    ],
)
def test_reverse_distillation_does_not_collapse(backend, source, restored, tmp_path):
    """The published study saw its image AUROC fall from .95 to .50 in INT8, to .82 on TensorRT."""
    run, data = restored
    options = {"epochs": 1, "accelerator": "cpu"} if backend == "nncf-qat" else {}
    manifest = quantize(Order(run, tmp_path / "q", backend, source, 12, data=str(data), options=options))
    # Noise of 64 pixels costs this run 0.07, and 0.17 of a product: far from chance, and not nothing.
    mean, worst, rank = (0.03, 0.06, 0.9) if source == "dataset" else (0.1, 0.25, 0.6)
    if backend != "nncf-qat":
        for agreement in manifest.agreement.values():
            assert agreement["map_l2"] < 0.15
            assert agreement["map_rank"] > rank
    assert manifest.auroc["mean"]["image_auroc"]["fp32"] > 0.75
    assert manifest.auroc["mean"]["image_auroc"]["drop"] < mean
    for name in manifest.categories:
        # A pair of a good and a defective image that changes places is 0.007.
        assert manifest.auroc[name]["image_auroc"]["drop"] < worst, name
    assert manifest.auroc["mean"]["pixel_auroc"]["drop"] < mean
    if "openvino" in manifest.size:
        assert manifest.size["openvino"]["ratio"] <= 0.27


@pytest.fixture(scope="session")
def students(products, tmp_path_factory):
    """A run of Uninformed Students on two scales."""
    out = tmp_path_factory.mktemp("students") / "run"
    options = {"patch_sizes": [17, 33], "students": 2, "width": 0.0625, "stride": 4}
    options["teacher"] = {"steps": 6, "batch_size": 8, "lr": 1e-3}
    model = {"name": "uninformed_students", "options": options}
    small_run(products, out, {"model": model, "data": {"val_fraction": 0.3}, "optimizer": {"name": "adam", "lr": 1e-3}})
    return out


@pytest.mark.parametrize(("backend", "source"), [("openvino-int8", "random-normal"), ("tensorrt-int8", "dataset")])
def test_uninformed_students_are_quantized(backend, source, students, products, tmp_path):
    manifest = quantize(Order(students, tmp_path / "q", backend, source, 9, data=str(products)))
    for agreement in manifest.agreement.values():
        assert agreement["map_l2"] < 0.15
        assert agreement["map_rank"] > 0.9
    assert manifest.auroc["mean"]["image_auroc"]["drop"] < 0.1


def test_uninformed_students_keep_statistics_of_the_quantized_network(students, tmp_path):
    """They are in the checkpoint of a trained result; those of the descriptors stay what the students were trained on."""
    import torch

    options = {"epochs": 1, "accelerator": "cpu"}
    quantize(Order(students, tmp_path / "q", "nncf-qat", samples=6, options=options))
    state = torch.load(tmp_path / "q" / "quantized.ckpt", weights_only=True)["state_dict"]
    run = Run.open(students)
    network = model_plugin("uninformed_students").load(run.checkpoint, run.config()).model
    assert not torch.equal(state["network.score_mean"], network.score_mean)
    assert torch.equal(state["network.feature_mean"], network.feature_mean)


@pytest.mark.parametrize("size", [[64, 96], 80])
@pytest.mark.parametrize("backend", ["openvino-int8", "tensorrt-int8"])
def test_any_input_size_is_quantized(size, backend, products, tmp_path):
    small_run(products, tmp_path / "run", {"model": {"layers": ["layer1"]}, "data": {"image_size": size}})
    manifest = quantize(Order(tmp_path / "run", tmp_path / "q", backend, "random-normal", 4))
    height, width = size if isinstance(size, list) else (size, size)
    assert manifest.image_size == (height, width)
    assert manifest.calibration["shape"] == [1, 3, height, width]
    with open_detector(tmp_path / "q") as detector:
        (prediction,) = detector.stream([scan(products).paths[0]])
    assert prediction.anomaly_map.shape == (height, width)


def test_accuracy_control_without_labels(small, tmp_path):
    """Layers may stay in float, and the result says how many."""
    options = {"max_drop": 0.001, "max_layers": 2}
    manifest = quantize(Order(small, tmp_path / "q", "openvino-int8", samples=6, options=options))
    assert manifest.details["guard"].startswith("rank correlation")
    placed = manifest.placement["model.xml"]
    assert placed["convolutions"] - placed["quantized"] == len(placed["in_float"])
    assert 0 <= manifest.details["drop"] <= 0.001


def test_accuracy_control_that_runs_out_of_layers_is_rejected(small, tmp_path, monkeypatch):
    """NNCF returns what it has by then, without a word."""
    ranked = []
    whole = nncf.quantize_with_accuracy_control

    def watched(*arguments, **options):
        ranked.append(
            (options["advanced_accuracy_restorer_parameters"].ranking_subset_size, len(list(arguments[2].get_data())))
        )
        return whole(*arguments, **options)

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", watched)
    options = {"max_drop": 1e-5, "max_layers": 1}
    with pytest.raises(UadxError) as error:
        quantize(Order(small, tmp_path / "q", "openvino-int8", samples=3, options=options))
    assert [asked for asked, _ in ranked] == [images for _, images in ranked] == [3]
    manifest = Quantized(tmp_path / "q").manifest()
    assert manifest.status == "rejected"
    drop = manifest.details["drop"]
    assert drop > 1e-5
    assert error.value.message == (
        f"the result is not good: a product loses {drop:.4f} of rank correlation of maps with FP32, by category, "
        "more than 1e-05"
    )
    assert error.value.hint.endswith("a higher --max-drop, more --set max_layers, --backend nncf-qat")


def test_accuracy_control_guards_each_category(table):
    from types import SimpleNamespace

    from uad_plugins.quantization.openvino_int8 import Guard

    samples = [Sample(s.path, s.category, s.label, "val" if s.split == "test" else s.split, s.mask, s.defect) for s in table]
    labelled = SampleTable(samples, table.root)
    data = calibration(labelled)
    seen = []

    def counts(image):
        # The first model that is asked is the one to compare with: right about every image.
        seen.append(image)
        return [np.array([float(labelled.labels[labelled.where(split="val")[len(seen) - 1]])]), np.zeros((1, 64, 64))]

    guard = Guard(SimpleNamespace(table=labelled, image_size=(64, 64), calibration=data), counts)
    assert guard.labelled
    assert guard.record["guard"] == "image AUROC of each category"
    truth = {id(image): label for image, label in zip(guard.images, guard._labels, strict=True)}
    category = dict(zip(map(id, guard.images), guard._names, strict=True))

    def perfect(image):
        return [np.array([float(truth[id(image)])]), np.zeros((1, 64, 64))]

    def blind_to_washers(image):
        return perfect(image) if category[id(image)] != "washer" else [np.array([0.0]), np.zeros((1, 64, 64))]

    assert guard.measure(perfect, guard.images) == (1.0, None)
    # Over all categories the AUROC is still good: the worst one decides.
    assert guard.measure(blind_to_washers, guard.images)[0] == pytest.approx(0.5)


def test_a_broken_result_is_rejected(small, tmp_path):
    """A backend that quantizes the head: exit status 1, what to try, and nothing that later verbs would open."""

    def breaks(request):
        model = to_onnx(request.core, request.image_size)
        save_onnx(model, request.folder / "model.onnx")
        return QuantizationResult(["model.onnx"], "int8", "tensorrt")

    with registered("quantizer", QuantizerPlugin("broken", "claims what it is not", breaks)):
        done = command("quantize", small, "--backend", "broken", "--out", tmp_path / "q", "--calibration", "random-normal")
    error = done.exception
    assert isinstance(error, UadxError)
    assert error.exit_code == 1
    assert "no node is quantized" in error.message
    assert "--calibration dataset" in error.hint
    assert Quantized(tmp_path / "q").manifest().status == "rejected"
    assert not (tmp_path / "q" / "thresholds.json").exists()
    with pytest.raises(UadxError, match="was rejected"):
        open_detector(tmp_path / "q")


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], "neither model.onnx nor model.xml was written"),
        (["notes.txt"], "notes.txt was not written"),
        (["model.onnx"], "model.onnx was not written"),
    ],
)
def test_a_backend_that_writes_no_model_is_told_so(files, complaint, small, tmp_path):
    plugin = QuantizerPlugin("idle", "writes nothing", lambda _: QuantizationResult(files, "int8", "openvino"))
    with registered("quantizer", plugin), pytest.raises(UadxError) as error:
        quantize(Order(small, tmp_path / "q", "idle", samples=3))
    assert error.value.message == f"the result is not good: {complaint}"
    assert Quantized(tmp_path / "q").manifest().status == "rejected"


@pytest.mark.parametrize("backend", ["fp32", "fp16"])
def test_float_backends_take_no_calibration(backend, small, tmp_path):
    lines = []
    manifest = quantize(Order(small, tmp_path / "q", backend, samples=2), lines.append)
    assert manifest.calibration["source"] == "none"
    assert manifest.calibration["samples"] == manifest.calibration["asked"] == 0
    assert lines[0] == f"quantizing with {backend}, no calibration"


@pytest.mark.parametrize(("backend", "status"), [("tensorrt-int8", "finished"), ("openvino-int8", "rejected")])
def test_a_graph_for_tensorrt_is_judged_node_by_node(backend, status, small, tmp_path, monkeypatch):
    """On a processor whose sums saturate OpenVINO is wrong about it; that is recorded, and says nothing about the device."""
    used = []

    def saturated(reference, candidate, paths, **options):
        agreement = compare(reference, candidate, paths, **options)
        return replace(agreement, map_l2=0.6) if "openvino" in (reference.engine, candidate.engine) else agreement

    def thresholds(detector, *arguments, **options):
        used.append(detector.engine)
        return thresholds_from_samples(detector, *arguments, **options)

    monkeypatch.setattr("uad_plugins.quantization.quantize.compare", saturated)
    monkeypatch.setattr("uad_plugins.quantization.quantize.thresholds_from_samples", thresholds)
    order = Order(small, tmp_path / "q", backend, samples=3)
    if status == "finished":
        quantize(order)
        assert used == ["onnxruntime"]
    else:
        with pytest.raises(UadxError, match="maps differ by 0.600"):
            quantize(order)
    manifest = Quantized(tmp_path / "q").manifest()
    assert manifest.status == status
    recorded = {name for name, values in manifest.agreement.items() if values["map_l2"] == 0.6}
    assert recorded == {name for name in manifest.agreement if "openvino" in name} != set()


def test_a_collapsed_result_is_rejected(small, tmp_path):
    """Its structure is right; the referee sees that the maps are not."""

    def collapses(request):
        model = to_onnx(request.core, request.image_size)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("student_model.feature_extractor.layer1.0.conv1.weight") or len(tensor.dims) == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
        save_onnx(model, request.folder / "model.onnx")
        return QuantizationResult(["model.onnx"], "fp32", "float")

    with (
        registered("quantizer", QuantizerPlugin("flat", "all weights are 0", collapses)),
        pytest.raises(UadxError, match="maps differ"),
    ):
        quantize(Order(small, tmp_path / "q", "flat", samples=3))


@pytest.mark.parametrize(
    ("backend", "options", "tries"),
    [
        (
            "openvino-int8",
            {"bias_correction": "fast"},
            "--calibration dataset, --set bias_correction=full, --set overflow_fix=enable, --max-drop 0.005, "
            "--backend nncf-qat",
        ),
        ("openvino-int8", {"bias_correction": "full", "max_drop": 0.1, "overflow_fix": "enable"}, "--backend nncf-qat"),
        ("tensorrt-int8", {}, "--calibration dataset, --backend nncf-qat --set profile=tensorrt"),
        (
            "tensorrt-int8",
            {"bias_correction": "fast"},
            "--calibration dataset, --set bias_correction=full, --backend nncf-qat --set profile=tensorrt",
        ),
        ("nncf-qat", {"epochs": 1, "accelerator": "cpu"}, "--calibration dataset, nncf-qat with a lower --set lr"),
        ("fp16", {}, "--backend fp32"),
    ],
)
def test_the_advice_can_be_taken(backend, options, tries, small, tmp_path, monkeypatch):
    """What is advised exists for the backend."""
    monkeypatch.setattr("uad_plugins.quantization.quantize.auditing.wrong", lambda _: ["no good"])
    source = "dataset" if options.get("max_drop") else "random-normal"
    with pytest.raises(UadxError) as error:
        quantize(Order(small, tmp_path / "q", backend, calibration=source, samples=3, options=options))
    assert error.value.message == "the result is not good: no good"
    assert error.value.hint == f"the files are kept for looking at, marked as rejected; try {tries}"


def test_full_bias_correction_is_refused_where_there_is_none(small, tmp_path):
    with pytest.raises(UsageError) as error:
        quantize(Order(small, tmp_path / "q", "nncf-qat", options={"bias_correction": "full"}))
    assert error.value.message == "unknown configuration key 'bias_correction'"
    assert not (tmp_path / "q").exists()


def test_folders_are_not_overwritten_by_mistake(int8, small, tmp_path):
    out, _ = int8
    with pytest.raises(UadxError, match="holds a finished quantized model"):
        quantize(Order(small, out, "fp32"))
    with pytest.raises(UadxError, match="no quantized model"):
        quantize(Order(small, small, "fp32"))
    with pytest.raises(UsageError, match="contradict"):
        quantize(Order(small, tmp_path / "q", "fp32", resume=True, overwrite=True))


def test_wrong_usage_is_told_before_anything_is_done(small, tmp_path):
    out = tmp_path / "q"
    with pytest.raises(UsageError, match="unknown quantizer 'openvino-int'") as error:
        quantize(Order(small, out, "openvino-int"))
    assert "openvino-int8" in error.value.hint
    with pytest.raises(UsageError, match="unknown configuration key 'bias'"):
        quantize(Order(small, out, "openvino-int8", options={"bias": "full"}))
    with pytest.raises(UsageError, match="max_drop"):
        quantize(Order(small, out, "openvino-int8", options={"max_drop": 2}))
    with pytest.raises(UsageError, match="unknown calibration source 'random'"):
        quantize(Order(small, out, "fp32", calibration="random"))
    with pytest.raises(UsageError, match="2 calibration images cannot cover 3 products"):
        quantize(Order(small, out, "openvino-int8", samples=2))
    assert command("quantize", small).exception.message == "no folder to write the quantized model to"
    assert not out.exists()


def test_a_run_of_another_version_is_one_line(small, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    write_json(run / "run.json", {**read_json(run / "run.json"), "schema": "uadx.run/9"})
    with pytest.raises(UadxError, match="schema 'uadx.run/9' is not known to this version"):
        quantize(Order(run, tmp_path / "q", "fp32"))


def test_a_quantized_model_of_another_version_is_one_line(int8, tmp_path):
    folder = shutil.copytree(int8[0], tmp_path / "q")
    write_json(folder / "quantized.json", {**read_json(folder / "quantized.json"), "schema": "uadx.quantized/9"})
    with pytest.raises(UadxError, match="schema 'uadx.quantized/9' is not known to this version"):
        open_detector(folder)


def test_changed_files_are_noticed(int8, tmp_path):
    folder = shutil.copytree(int8[0], tmp_path / "q")
    with (folder / "model.bin").open("r+b") as file:
        file.write(b"0000")
    with pytest.raises(UadxError, match="is not the file that was written"):
        open_detector(folder)


def test_data_that_has_gone_says_how_to_name_it(small, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    content = read_json(run / "run.json")
    content["data"]["root"] = str(tmp_path / "gone")
    write_json(run / "run.json", content)
    with pytest.raises(UadxError, match="the run's data is not there") as error:
        quantize(Order(run, tmp_path / "q", "fp32"))
    assert "--data" in error.value.hint


def changed_products(products, folder):
    """The products with a fourth one, and more good parts of the first."""
    data = shutil.copytree(products, folder)
    shutil.copytree(data / "washer", data / "rivet")
    for number, path in enumerate(sorted((data / "connector" / "train" / "good").iterdir())[:6]):
        shutil.copy(path, path.with_name(f"added{number}{path.suffix}"))
    return data


def test_only_what_the_run_held_out_counts_as_held_out(small, products, tmp_path):
    """A product that was added is left out; images that were added do not make trained ones held out."""
    data, lines = changed_products(products, tmp_path / "data"), []
    found = samples_of(Run(small), str(data), lines.append)
    before = samples_of(Run(small), str(products), pytest.fail)
    assert found.categories == ["connector", "fabric", "washer"]
    held, expected = ({t.relative(int(i)) for i in t.where(split="val")} for t in (found, before))
    assert held == expected == Run(small).held_out()
    assert held == {t.relative(int(i)) for t in [hold_out(scan(products), 0.1, 0)] for i in t.where(split="val")}
    assert lines == [
        "note: the run was not trained on rivet: left out",
        "note: the training images have changed (connector: 10 then, 16 now); held out is what was held out from training",
    ]
    manifest = quantize(Order(small, tmp_path / "q", "openvino-int8", samples=6, data=str(data)))
    assert set(manifest.auroc) == {"connector", "fabric", "washer", "mean"}
    assert set(manifest.calibration["images"]) == {"connector", "fabric", "washer"}


def test_changed_images_of_a_run_that_does_not_say_what_it_held_out_are_refused(small, products, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    (run / "split.json").unlink()
    assert len(samples_of(Run(run), str(products), pytest.fail)) == len(scan(products))
    data = changed_products(products, tmp_path / "data")
    with pytest.raises(UadxError) as error:
        samples_of(Run(run), str(data), lambda _: None)
    assert error.value.message == (
        f"{data}: the training images have changed since the run was trained (connector: 10 then, 16 now)"
    )


def test_other_images_than_the_runs_are_refused(small, products, tmp_path):
    data = shutil.copytree(products, tmp_path / "data")
    for path in (data / "fabric" / "train" / "good").iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    with pytest.raises(UadxError) as error:
        samples_of(Run(small), str(data), lambda _: None)
    assert error.value.message == f"{data}: none of the images of fabric is there that were held out from training"


def test_preprocessing_is_the_models_own(small, products):
    run = Run.open(small)
    model = model_plugin("stfpm").load(run.checkpoint, run.config()).eval()
    import torch

    images = np.stack([resize_rgb(read_rgb(path), (64, 64)) for path in list(scan(products).paths)[:2]])
    with torch.no_grad():
        expected = model.pre_processor(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(normalise(images, MEAN, STD), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("method", ["stfpm", "reverse_distillation", "uninformed_students"])
@pytest.mark.parametrize("profile", ["openvino", "tensorrt"])
def test_a_quantized_network_is_restored_bit_for_bit(method, profile, tmp_path):
    import torch

    model, image = quantized(method, profile), noise(1, seed=3)[0]
    save_quantized(model, tmp_path / "quantized.ckpt", profile=profile)
    again = load_quantized(core(method), tmp_path / "quantized.ckpt")
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(model(image), again(image), strict=True))
    assert model.state_dict().keys() == again.state_dict().keys()


def test_the_overflow_fix_goes_by_the_processor(monkeypatch):
    monkeypatch.setattr("uad_plugins.cpu.cpu_flags", lambda: ["avx2", "avx512f"])
    assert chosen_fix("auto") == "first_layer"
    monkeypatch.setattr("uad_plugins.cpu.cpu_flags", lambda: ["avx2", "avx512f", "avx512_vnni"])
    assert chosen_fix("auto") == "disable"
    assert chosen_fix("enable") == "enable"
    assert OpenvinoOptions().overflow_fix == "auto"


@pytest.mark.slow
def test_the_quickstart_includes_int8_and_a_bundle(tmp_path, monkeypatch):
    results, real = [], quickstart.run_quickstart
    monkeypatch.setattr(quickstart, "run_quickstart", lambda *a, **k: results.append(real(*a, **k)) or results[0])
    done = command("quickstart", "--out", tmp_path / "out", "--epochs", "1", "--image-size", "64", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["int8"]["status"] == "finished"
    assert document["int8"]["auroc"]["mean"]["image_auroc"]["fp32"] == pytest.approx(document["mean"]["image_auroc"])
    assert Quantized.open(tmp_path / "out" / "int8").manifest().precision == "int8"
    assert "FP32 beside INT8" in (tmp_path / "out" / "report.html").read_text()
    bundle = Bundle.open(tmp_path / "out" / "bundle").manifest
    assert document["bundle"] == json.loads(bundle.model_dump_json(by_alias=True))
    assert (bundle.target, bundle.precision, bundle.metrics["verified_on"]) == ("openvino-cpu", "int8", "held-out images")
    example = document["example"]
    assert example["engine"] == "openvino"
    with open_detector(tmp_path / "out" / "int8") as detector:
        (found,) = detector.stream([example["path"]])
    assert example["score"] == pytest.approx(found.score, rel=1e-3)
    assert example["threshold"] == bundle.thresholds.categories[example["category"]].value
    assert example["verdict"] in {"normal", "anomalous"}
    assert {"deploy", "quantize"} <= set(document["seconds"])
    assert "5/5  deploying the INT8 model as a bundle for CPUs, run without torch" in done.stderr

    monkeypatch.setattr(quickstart, "run_quickstart", lambda *_, **__: results[0])
    done = command("quickstart", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert f"bundle     {tmp_path / 'out' / 'bundle'}: int8 for openvino-cpu, " in done.stdout
    assert "(openvino, without torch)" in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "  uadx deploy INT8 --target openvino-cpu --out BUNDLE",
        "  uadx predict BUNDLE IMAGES --category CATEGORY --out MAPS",
    ]


def test_the_placement_oracle_compares_where_it_is_installed(small, tmp_path):
    """ModelOpt needs an environment of its own: where it is absent the script says so and does nothing."""
    for backend in ("fp32", "tensorrt-int8"):
        quantize(Order(small, tmp_path / backend, backend, samples=3))
    script = Path(__file__).parents[1] / "benchmarks" / "modelopt_oracle.py"
    words = [sys.executable, str(script), str(tmp_path / "fp32"), str(tmp_path / "tensorrt-int8")]
    done = subprocess.run([*words, "--out", str(tmp_path / "oracle.onnx")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    if importlib.util.find_spec("modelopt") is None:
        assert "modelopt is not installed" in done.stderr
    else:
        document = json.loads(done.stdout)
        assert document["modelopt"]["weights"] == document["ours"]["weights"]
        assert document["ours"]["main branches"] == 0


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    left, right = np.random.default_rng(0).random((2, 50))
    assert rank_correlation(left, right) == pytest.approx(spearmanr(left, right).statistic)
    assert rank_correlation(left, np.full(50, np.nan)) == 0.0


def test_agreement_is_judged_by_every_limit(small, products):
    with open_detector(small) as one, open_detector(small) as two:
        agreement = compare(one, two, list(scan(products).paths)[:3])
    assert agreement.map_l2 == 0
    assert agreement.map_rank == pytest.approx(1)
    assert agreement.wrong(Limits(0.1, 0.9, 0.1)) == []
    assert len(agreement.wrong(Limits(-1, 2, -1))) == 3


@pytest.mark.parametrize("ratio_scale", [True, False])
def test_a_common_shift_counts_only_where_zero_means_something(ratio_scale):
    expected = np.random.default_rng(0).normal(size=(3, 40))
    distance = Distance(ratio_scale)
    for row in expected:
        distance.add(row, 1.5 * row + 7)
    centred = expected - expected.mean()
    difference, total = (0.5 * expected + 7, expected) if ratio_scale else (0.5 * centred, centred)
    assert distance.value() == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(total))
    distance.add(expected[0], np.full(40, np.inf))
    assert np.isnan(distance.value())


def test_zscores_are_compared_without_their_common_shift(small, tmp_path, monkeypatch):
    seen = []

    def noted(*arguments, **options):
        seen.append(options.get("ratio_scale", True))
        return compare(*arguments, **options)

    monkeypatch.setattr("uad_plugins.quantization.quantize.compare", noted)
    monkeypatch.setattr("uad_plugins.quantization.quantize.ratio_scale", lambda _: False)
    quantize(Order(small, tmp_path / "q", "fp32"))
    # Against FP32; between engines a shift is a fault whatever it means.
    assert seen == [False] * 3 + [True] * 2


def test_a_model_that_needs_the_category_is_refused():
    from types import SimpleNamespace

    from uad_plugins.quantization.core import build_core

    with pytest.raises(UadxError, match="statistics are by category"):
        build_core(SimpleNamespace(by_category=True), (64, 64))
