"""The verb: from a run to a quantized model that later verbs read like a run; what is refused or rejected says why."""

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner
from uadx.app import app

from uad_plugins import quickstart
from uad_plugins.artifacts import Run, read_json, write_json
from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import hold_out
from uad_plugins.deployment.bundle import Bundle
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.hookspecs import QuantizationResult, QuantizerPlugin
from uad_plugins.quantization import outliers
from uad_plugins.quantization.export import save_onnx, to_onnx
from uad_plugins.quantization.quantize import Order, quantize
from uad_plugins.quantization.samples import samples_of
from uad_plugins.quantized import Quantized
from uad_plugins.testing.common import registered


@pytest.fixture(scope="session")
def int8(small, products, tmp_path_factory):
    """``small`` in INT8 for OpenVINO, measured on the labelled test split. Not to be changed."""
    out = tmp_path_factory.mktemp("int8") / "q"
    manifest = quantize(Order(small, out, "openvino-int8", samples=9, data=str(products)))
    return out, manifest


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


@pytest.mark.parametrize(
    ("backend", "options", "tries"),
    [
        (
            "openvino-int8",
            {"bias_correction": "fast"},
            "--calibration dataset, --noise-std 2, --set bias_correction=full, --set overflow_fix=enable, --max-drop 0.005, "
            "--backend nncf-qat",
        ),
        ("openvino-int8", {"bias_correction": "full", "max_drop": 0.1, "overflow_fix": "enable"}, "--backend nncf-qat"),
        ("tensorrt-int8", {}, "--calibration dataset, --noise-std 2, --backend nncf-qat --set profile=tensorrt"),
        (
            "tensorrt-int8",
            {"bias_correction": "fast"},
            "--calibration dataset, --noise-std 2, --set bias_correction=full, --backend nncf-qat --set profile=tensorrt",
        ),
        (
            "nncf-qat",
            {"epochs": 1, "accelerator": "cpu"},
            "--calibration dataset, --noise-std 2, nncf-qat with a lower --set lr",
        ),
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


def test_a_backend_may_say_of_its_calibration_what_it_likes(small, tmp_path):
    done = with_calibration({"by": "hand"}, small, tmp_path, precision="fp32")
    assert done.exit_code == 0, done.exception
    assert Quantized(tmp_path / "q").manifest().calibration == {"by": "hand"}


@pytest.mark.parametrize("calibration", [{"by": "hand"}, {"source": "mixed", "noise_std": None}])
def test_advice_knows_only_the_noise_that_there_was(calibration, small, tmp_path):
    done = with_calibration(calibration, small, tmp_path, precision="int8", complaints=["not good enough"])
    assert isinstance(done.exception, UadxError)
    assert "not good enough" in done.exception.message
    assert "--noise-std" not in done.exception.hint


def with_calibration(calibration, run, folder, precision, complaints=()):
    """Quantize with a backend that writes what it was given, and this for its calibration."""

    def writes(request):
        save_onnx(to_onnx(request.core, request.image_size), request.folder / "model.onnx")
        return QuantizationResult(["model.onnx"], precision, "float", calibration=calibration, complaints=complaints)

    with registered("quantizer", QuantizerPlugin("own", "calibrates by itself", writes)):
        return command("quantize", run, "--backend", "own", "--out", folder / "q")


def test_folders_are_not_overwritten_by_mistake(int8, small, tmp_path):
    out, _ = int8
    with pytest.raises(UadxError, match="holds a finished quantized model"):
        quantize(Order(small, out, "fp32"))
    with pytest.raises(UadxError, match="no quantized model"):
        quantize(Order(small, small, "fp32"))
    with pytest.raises(UsageError, match="contradict"):
        quantize(Order(small, tmp_path / "q", "fp32", resume=True, overwrite=True))


def test_what_was_not_calibrated_with_is_said(small, tmp_path, monkeypatch):
    monkeypatch.setattr(outliers, "FACTOR", 1.0)
    done = command("quantize", small, "--samples", 100, "--out", tmp_path / "q")
    assert done.exit_code == 0, done.stderr
    record = Quantized(tmp_path / "q").manifest().calibration
    assert (record["asked"], record["samples"] + len(record["left_out"])) == (100, 27)
    assert record["left_out"]
    assert "note: 100 calibration samples were asked for, there are images for 27" in done.stderr
    assert f"note: {len(record['left_out'])} odd images were left out of the calibration" in done.stderr


def test_wrong_usage_is_told_before_anything_is_done(small, products, tmp_path):
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
    shutil.copytree(products, tmp_path / "part", ignore=shutil.ignore_patterns("washer"))
    with pytest.raises(UadxError, match="no normal training image of washer to calibrate with"):
        quantize(Order(small, out, "openvino-int8", data=str(tmp_path / "part")))
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


def test_the_layout_that_was_named_for_training_is_taken_again_where_the_data_lies_now(small, products, tmp_path):
    run, data = shutil.copytree(small, tmp_path / "run"), shutil.copytree(products, tmp_path / "data")
    image = next((data / "fabric" / "train" / "good").iterdir())
    (data / "index.csv").write_text(f"path,category,split,label\n{image},fabric,train,0\n")
    with pytest.raises(UadxError, match="none of the images of fabric is there that were held out"):
        samples_of(Run(run), str(data), lambda _: None)
    config = Run(run).config_file
    config.write_text(config.read_text().replace("layout: null", "layout: mvtec"))
    assert len(samples_of(Run(run), str(data), pytest.fail)) == len(scan(products))


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_finds_defects_without_a_network_and_includes_int8_and_a_bundle(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror("there is no network")

    results, real = [], quickstart.run_quickstart
    monkeypatch.setattr(quickstart, "run_quickstart", lambda *a, **k: results.append(real(*a, **k)) or results[0])
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, unreachable)
    done = command("quickstart", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["mean"]["image_auroc"] > 0.9
    assert document["mean"]["pixel_auroc"] > 0.9
    # A heat map of each test image: 24 good and 24 defective ones of three products.
    assert sum(1 for _ in (tmp_path / "out" / "evaluation" / "maps").rglob("*.jpg")) == 144
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

    # The folder is named relative to where one is, as the default is.
    data = Path(os.path.relpath(results[0].data))
    monkeypatch.setattr(quickstart, "run_quickstart", lambda *_, **__: replace(results[0], data=data))
    done = command("quickstart", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert f"bundle     {tmp_path / 'out' / 'bundle'}: int8 for openvino-cpu, " in done.stdout
    assert "(openvino, without torch)" in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "  uadx deploy INT8 --target openvino-cpu --out BUNDLE",
        "  uadx predict BUNDLE IMAGES --category CATEGORY --out MAPS",
    ]
