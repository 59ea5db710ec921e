"""``deploy``: what is packaged for each target, and that nothing unverified is left behind."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from uad_plugins.artifacts import Run, write_json
from uad_plugins.data.layouts import scan
from uad_plugins.deployment.bundle import Bundle
from uad_plugins.deployment.deploy import Order, deploy
from uad_plugins.deployment.jetson.uadx_jetson.bundle import read_bundle
from uad_plugins.deployment.servers import read_pbtxt
from uad_plugins.deployment.sources import Source
from uad_plugins.deployment.verify import random_images, verify
from uad_plugins.detector import open_detector
from uad_plugins.errors import EngineError, UadxError, UsageError
from uad_plugins.hookspecs import Requirement, RuntimePlugin
from uad_plugins.quantization.quantize import Order as QuantizationOrder
from uad_plugins.quantization.quantize import quantize, source_of
from uad_plugins.testing import TargetConformance
from uad_plugins.testing.common import registered


class TestOpenVinoCpu(TargetConformance):
    plugin = "openvino-cpu"


class TestOnnx(TargetConformance):
    plugin = "onnx"


class TestJetson(TargetConformance):
    plugin = "tensorrt-jetson"


@pytest.fixture(scope="module")
def int8(trained, tmp_path_factory):
    """The run quantized for OpenVINO."""
    out = tmp_path_factory.mktemp("quantized") / "int8"
    quantize(QuantizationOrder(trained, out, "openvino-int8", samples=8))
    return out


@pytest.fixture(scope="module")
def tensorrt(trained, tmp_path_factory):
    """The run quantized by TensorRT's rules."""
    out = tmp_path_factory.mktemp("quantized") / "tensorrt"
    quantize(QuantizationOrder(trained, out, "tensorrt-int8", samples=8))
    return out


def test_the_manifest_says_where_everything_comes_from(bundle, trained):
    manifest = Bundle.open(bundle).manifest
    assert (manifest.target, manifest.model, manifest.precision) == ("openvino-cpu", "stfpm", "fp32")
    assert manifest.categories == ["connector", "fabric", "washer"]
    assert (manifest.input.shape, manifest.input.dtype, manifest.input.layout) == ((1, 64, 64, 3), "uint8", "NHWC")
    assert manifest.preprocessing.normalised_by == "graph"
    with open_detector(trained) as detector:
        assert Bundle.open(bundle).thresholds == detector.thresholds
    assert manifest.weights["licence"].startswith("Apache-2.0")
    assert manifest.metrics["training"]["best_epoch"] >= 1
    assert manifest.metrics["verified"]["openvino"]["map_l2"] < 1e-3
    assert manifest.metrics["verified_on"] == "held-out images"
    assert manifest.source["checkpoint_sha256"]
    assert str(trained.parent) not in (bundle / "bundle.json").read_text(), "no folder of this machine"


def test_data_is_found_by_the_layout_that_was_named_for_training(products, trained, tmp_path):
    """Also an index file, and after quantizing with data that lies elsewhere."""
    images = sorted((products / "fabric" / "train" / "good").iterdir())
    index = tmp_path / "index.csv"
    index.write_text("".join(["path,category,split,label\n", *(f"{path},fabric,train,0\n" for path in images)]))
    origin = {**Run(trained).source(), "fingerprint": None, "held_out": None}
    table = Source.table(SimpleNamespace(split={**origin, "data": str(index), "layout": "index"}))
    assert len(table) == len(images)
    data = shutil.copytree(products, tmp_path / "copy")
    shutil.copy(index, data)
    for layout, count in ((None, len(images)), ("mvtec", len(scan(products)))):
        assert len(Source.table(SimpleNamespace(split={**origin, "layout": layout}), str(data))) == count
    run = shutil.copytree(trained, tmp_path / "run")
    config = Run(run).config_file
    config.write_text(config.read_text().replace("layout: null", "layout: mvtec"))
    assert source_of(Run(run), str(data))["layout"] == "mvtec"
    assert source_of(Run(run), str(index))["layout"] is None


def test_the_model_card_has_tables_and_pictures(bundle):
    text = (bundle / "README.md").read_text()
    assert "| connector | 0." in text
    assert "uadx[openvino-runtime]" in text
    pictures = [line.partition("(")[2].partition(")")[0] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 6
    for name in pictures:
        with Image.open(bundle / name) as image:
            assert image.format == "JPEG"
            assert image.height == 192


def test_a_bundle_says_what_its_source_was_last_measured_at(trained, bundle, products, tmp_path, uadx):
    run = shutil.copytree(trained, tmp_path / "run")
    status, out, err = uadx("evaluate", run, products, "--json")
    assert status == 0, err
    report = json.loads(out)
    # A part of the products is no measurement of the model, and a sealed bundle notes nothing.
    for words in ([run, products, "--category", "washer"], [bundle, products]):
        assert uadx("evaluate", *words)[0] == 0
    assert not (bundle / "evaluation.json").exists()
    manifest = deploy(Order(run, tmp_path / "a", "onnx", pictures=False))
    assert manifest.metrics["evaluation"] == {
        "data": products.name,
        **{name: report[name] for name in ("categories", "mean", "pooled")},
    }
    assert str(products) not in (tmp_path / "a" / "bundle.json").read_text()
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"| mean: image auroc, evaluated | {report['mean']['image_auroc']:.4f} |" in card
    assert f"| washer: pixel auroc, evaluated | {report['categories']['washer']['pixel_auroc']:.4f} |" in card
    # Of another model it says nothing.
    content = {**json.loads((run / "evaluation.json").read_text()), "model": "another"}
    write_json(run / "evaluation.json", content)
    assert "evaluation" not in deploy(Order(run, tmp_path / "b", "onnx", pictures=False)).metrics


def test_the_openvino_model_takes_8_bit_pixels(bundle):
    import openvino

    model = openvino.Core().read_model(bundle / "model.xml")
    assert model.input(0).get_element_type().get_type_name() == "u8"
    assert list(model.input(0).shape) == [1, 64, 64, 3]


@pytest.mark.parametrize("target", ["tensorrt-jetson", "triton", "ovms"])
def test_targets_of_a_run(trained, tmp_path, target):
    manifest = deploy(Order(trained, tmp_path / "b", target, pictures=False))
    files = set(manifest.files)
    if target == "tensorrt-jetson":
        assert files >= {"model.onnx", "runner.py", "uadx_jetson/commands.py"}
        read = read_bundle(tmp_path / "b")
        assert (read.height, read.width, read.input_name) == (64, 64, manifest.input.name)
        assert read.thresholds["washer"] == manifest.thresholds.categories["washer"].value
        assert set(manifest.checks) == {"opset", "operators", "static shapes", "no identity on constants"}
        done = subprocess.run([sys.executable, tmp_path / "b" / "runner.py", "build"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "tensorrt and pycuda are needed on the device" in done.stderr
        assert "No engine had been built on a device" in (tmp_path / "b" / "README.md").read_text()
        Bundle.open(tmp_path / "b")
    elif target == "triton":
        config = read_pbtxt((tmp_path / "b" / "models" / "uadx" / "config.pbtxt").read_text())
        assert config["input"] == [{"name": manifest.input.name, "data_type": "TYPE_FP32", "dims": [1, 3, 64, 64]}]
        assert [tensor["dims"] for tensor in config["output"]] == [[1], [1, 64, 64]]
        assert manifest.onnx == "models/uadx/1/model.onnx"
    else:
        (entry,) = json.loads((tmp_path / "b" / "models" / "config.json").read_text())["model_config_list"]
        assert (tmp_path / "b" / "models" / entry["config"]["base_path"] / "1" / "model.xml").exists()
        assert manifest.openvino == "models/uadx/1/model.xml"


def test_an_int8_model_keeps_its_thresholds_and_scores(int8, tmp_path, products):
    manifest = deploy(Order(int8, tmp_path / "b.zip", "openvino-cpu"))
    assert (manifest.precision, manifest.profile) == ("int8", "openvino")
    assert manifest.calibration["samples"] == 8
    assert manifest.metrics["verified"]["openvino"]["score_l2"] < 1e-3
    assert sum(file.bytes for file in manifest.files.values()) < 8e6
    paths = sorted(str(path) for path in products.glob("*/test/*/*.png"))[::4]
    with open_detector(int8) as source, open_detector(tmp_path / "b.zip") as packed:
        assert packed.thresholds == source.thresholds
        wanted, found = list(source.stream(paths)), list(packed.stream(paths))
    np.testing.assert_allclose([item.score for item in found], [item.score for item in wanted], rtol=1e-4)


def test_the_card_of_an_int8_model_has_the_figures_that_it_brings(trained, products, tmp_path):
    """Training, AUROC beside FP32, agreement; and the licence of the weights wherever its run is."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    quantize(QuantizationOrder(run, tmp_path / "int8", "openvino-int8", samples=8, data=str(products)))
    manifest = deploy(Order(tmp_path / "int8", tmp_path / "a", "openvino-cpu", pictures=False))
    text = (tmp_path / "a" / "README.md").read_text()
    training = manifest.metrics["training"]
    assert f"| training: best epoch | {training['best_epoch']} of 2 |" in text
    assert f"| training: loss on held-out images | {training['best_val_loss']:.4g} |" in text
    assert f"| washer: loss on held-out images | {training['val_loss_per_category']['washer']:.4g} |" in text
    washer = manifest.metrics["quantization"]["auroc"]["washer"]["image_auroc"]
    assert f"| washer: image auroc | {washer['quantized']:.4f} (FP32 {washer['fp32']:.4f}) |" in text
    assert "| openvino model.xml against FP32 | maps differ by " in text
    run.rename(tmp_path / "elsewhere")
    again = deploy(Order(tmp_path / "int8", tmp_path / "b", "openvino-cpu", pictures=False))
    assert again.weights == manifest.weights
    assert again.weights["licence"].startswith("Apache-2.0")
    content = json.loads((tmp_path / "int8" / "quantized.json").read_text())
    del content["source"]["weights"]
    write_json(tmp_path / "int8" / "quantized.json", content)
    again = deploy(Order(tmp_path / "int8", tmp_path / "c", "openvino-cpu", pictures=False))
    unknown = "unknown: the run that it was quantized from is not there, and its record names none"
    assert again.weights == {"licence": unknown}
    assert f"| backbone weights | licence {unknown} |" in (tmp_path / "c" / "README.md").read_text()


def test_fp16_halves_the_file_and_stays_near(trained, bundle, tmp_path):
    half = deploy(Order(trained, tmp_path / "half", "openvino-cpu", precision="fp16", pictures=False))
    whole = Bundle.open(bundle).manifest
    assert half.precision == "fp16"
    assert half.files["model.bin"].bytes < 0.55 * whole.files["model.bin"].bytes


def openvino_qdq(station, tmp_path):
    """A quantized model that says it follows OpenVINO's rules, as nncf-qat writes it."""
    copy = Path(shutil.copytree(station, tmp_path / "q"))
    content = json.loads((copy / "quantized.json").read_text())
    write_json(copy / "quantized.json", {**content, "profile": "openvino"})
    return copy


def test_a_model_by_tensorrts_rules_goes_to_the_jetson_and_to_openvino(tensorrt, int8, tmp_path):
    manifest = deploy(Order(tensorrt, tmp_path / "jetson", "tensorrt-jetson", pictures=False))
    assert (manifest.precision, manifest.profile) == ("int8", "tensorrt")
    assert len(manifest.checks) > 10
    assert not [case for cases in manifest.checks.values() for case in cases]
    manifest = deploy(Order(tensorrt, tmp_path / "cpu", "openvino-cpu", pictures=False))
    assert manifest.metrics["verified"]["openvino"]["map_l2"] < 0.03
    with pytest.raises(UadxError, match="by OpenVINO's rules, which TensorRT does not take"):
        deploy(Order(openvino_qdq(tensorrt, tmp_path), tmp_path / "no", "tensorrt-jetson"))
    with pytest.raises(UadxError, match="has no ONNX file"):
        deploy(Order(int8, tmp_path / "onnx", "onnx"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cpu", "jetson", "q"]


def test_without_its_data_random_images_verify_it(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    content = json.loads((run / "run.json").read_text())
    content["data"]["root"] = str(tmp_path / "nowhere")
    write_json(run / "run.json", content)
    manifest = deploy(Order(run, tmp_path / "b", "openvino-cpu"))
    assert manifest.metrics["verified_on"] == "random images"
    assert manifest.metrics["verified"]["openvino"]["images"] == 6
    assert not (tmp_path / "b" / "pictures").exists()
    assert "## Examples" not in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(UadxError, match="no such file or folder"):
        deploy(Order(run, tmp_path / "c", "openvino-cpu", data=str(tmp_path / "nowhere")))


def test_random_images_are_the_same_each_time_and_of_several_sizes():
    first, again = random_images((64, 48), 4), random_images((64, 48), 4)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert [image.shape for image in first] == [(48, 36, 3), (64, 48, 3), (80, 60, 3), (96, 72, 3)]


@pytest.mark.parametrize("error", [EngineError("not on this processor"), ZeroDivisionError("division")])
def test_an_engine_that_declines_leaves_the_bundle_to_the_others(trained, tmp_path, error):
    def declines(folder):
        if Path(folder) != trained:
            raise error

    missing = [Requirement("nowhere.engine", "pip install nowhere")]
    with (
        registered("runtime", RuntimePlugin("odd", "an engine", declines)),
        registered("runtime", RuntimePlugin("missing", "an engine", declines, requires=missing)),
    ):
        lines = []
        deploy(Order(trained, tmp_path / "b", "openvino-cpu"), lines.append)
        assert [line for line in lines if line.startswith("warning: ")] == [
            f"warning: {'' if isinstance(error, UadxError) else 'odd: ZeroDivisionError: '}{error}; "
            "the bundle is verified without it"
        ]
        assert list(Bundle.open(tmp_path / "b").manifest.metrics["verified"]) == ["openvino"]
        (tmp_path / "empty").mkdir()
        with pytest.raises(UadxError, match=f"no engine on this machine can run the bundle to verify it: .*{error}"):
            verify(tmp_path / "empty", open_detector(trained), "fp32", [])


def test_a_bundle_that_says_something_else_is_not_written(trained, tmp_path, monkeypatch):
    # The detector first: what it imports from the graph's module must not be what stands there for this test.
    from uad_plugins.runtime import graph, openvino_detector

    assert openvino_detector.prepare is graph.prepare
    original = graph.prepare
    monkeypatch.setattr(graph, "prepare", lambda model, mean, std: original(model, mean, (1.0, 1.0, 1.0)))
    with pytest.raises(UadxError, match="does not say what its source says: openvino: maps differ"):
        deploy(Order(trained, tmp_path / "b", "openvino-cpu"))
    assert list(tmp_path.iterdir()) == []


def test_deploying_for_a_jetson_says_for_which_versions_of_tensorrt_it_is_good(trained, tmp_path, monkeypatch):
    from uad_plugins.quantization.tensorrt_versions import PARSERS

    said = []
    manifest = deploy(Order(trained, tmp_path / "a", "tensorrt-jetson", pictures=False), said.append)
    assert "good for TensorRT 8.5, 8.6, 10.3, 10.15, 11" in said
    assert manifest.details["tensorrt"] == {version: [] for version in PARSERS}
    for version in ("8.5", "8.6"):
        monkeypatch.setitem(PARSERS, version, replace(PARSERS[version], max_opset=16))
    manifest = deploy(Order(trained, tmp_path / "b", "tensorrt-jetson", pictures=False), said.append)
    assert said[-4:-1] == [
        "good for TensorRT 10.3, 10.15, 11",
        "not for TensorRT 8.5: opset 17 is newer than 16",
        "not for TensorRT 8.6: opset 17 is newer than 16",
    ]
    assert manifest.details["tensorrt"]["8.5"] == ["opset 17 is newer than 16"]
    assert not [case for cases in manifest.checks.values() for case in cases]
    card = (tmp_path / "b" / "README.md").read_text()
    assert "operators and opset are those of version 10.3, 10.15, 11" in card
    assert "numbers are those of ONNX Runtime" not in card


def test_what_breaks_a_targets_rules_is_not_written(trained, tmp_path, monkeypatch):
    from uad_plugins.quantization.tensorrt_versions import PARSERS

    for version, parser in PARSERS.items():
        monkeypatch.setitem(PARSERS, version, replace(parser, operators=parser.operators - {"Conv"}))
    with pytest.raises(UadxError, match="does not keep the rules of tensorrt-jetson: operators: .*; and"):
        deploy(Order(trained, tmp_path / "b", "tensorrt-jetson"))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_is_built_into_the_bundle_and_the_equal_line_is_told(trained, tmp_path, monkeypatch):
    """By the runner that was packaged, in a process of its own, with fakes of TensorRT and pycuda that record."""
    tests, fakes = Path(__file__).parent, tmp_path / "fakes"
    (fakes / "pycuda").mkdir(parents=True)
    (fakes / "pycuda" / "__init__.py").touch()
    (fakes / "a_device.py").write_text(
        f"import sys\nsys.path.append({str(tests)!r})\nfrom pathlib import Path\nfrom jetson_device import Device\n"
        "device = Device('10.3', Path('.'))\n"
    )
    (fakes / "tensorrt.py").write_text("import a_device, sys\nsys.modules[__name__] = a_device.device.trt\n")
    (fakes / "pycuda" / "driver.py").write_text("import a_device, sys\nsys.modules[__name__] = a_device.device.cuda\n")
    monkeypatch.syspath_prepend(str(fakes))
    monkeypatch.setenv("PYTHONPATH", str(fakes))
    said, out = [], tmp_path / "b"
    deploy(Order(trained, out, "tensorrt-jetson", pictures=False, build_engine=True), said.append)
    assert (out / "engine" / "model.engine").read_bytes() == b"engine"
    sidecar = json.loads((out / "engine" / "model.engine.json").read_text())
    assert said[-1] == f"the same with trtexec, in {out}: {sidecar['trtexec']}"
    words = sidecar["trtexec"].split()
    assert words[:3] == ["trtexec", "--onnx=model.onnx", "--saveEngine=engine/model.engine"]
    Bundle.open(out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": "openvino-gpu"}, UsageError, "unknown target 'openvino-gpu'"),
        ({"options": {"nam": "x"}, "target": "ovms"}, UsageError, "nam"),
        ({"options": {"name": "../x"}, "target": "triton"}, UsageError, "name"),
        ({"source": Path("nowhere")}, UadxError, "no such file or folder"),
        ({"build_engine": True}, UsageError, "--build-engine is for --target tensorrt-jetson"),
        ({"build_engine": True, "target": "tensorrt-jetson"}, UadxError, "needs tensorrt and pycuda"),
    ],
)
def test_wrong_orders_are_refused_before_anything_is_written(trained, tmp_path, monkeypatch, change, error, message):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    order = {"source": trained, "out": tmp_path / "b", "target": "openvino-cpu", **change}
    with pytest.raises(error, match=message):
        deploy(Order(**order))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_source_is_refused(bundle, products, int8, tmp_path):
    for source in (bundle, products):
        with pytest.raises(UadxError, match="neither a run nor a quantized model"):
            deploy(Order(source, tmp_path / "b", "onnx"))
    with pytest.raises(UsageError, match="--precision is for runs"):
        deploy(Order(int8, tmp_path / "b", "openvino-cpu", precision="fp16"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(UadxError, match="exists and is not a bundle"):
        deploy(Order(int8, tmp_path / "b", "openvino-cpu", overwrite=True))


@pytest.mark.parametrize("words", [["--engine", "onnxruntime"], []])
def test_evaluate_gives_the_report_of_the_run(onnx_bundle, trained, products, capsys, words):
    from uadx.app import main

    def report(station, *more):
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(station), str(products), "--json", *more])
        assert not stopped.value.code
        return json.loads(capsys.readouterr().out)

    found, wanted = report(onnx_bundle, *words), report(trained)
    assert set(found) == set(wanted)
    for category, values in wanted["categories"].items():
        assert found["categories"][category] == pytest.approx(values, abs=1e-3)
    for category, values in wanted["decisions"].items():
        assert found["decisions"][category] == pytest.approx(values)
