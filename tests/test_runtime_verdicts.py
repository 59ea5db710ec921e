"""What a detector without torch says of an image: threshold and verdict, or an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from uad_plugins.deployment.bundle import Bundle, seal
from uad_plugins.errors import UsageError
from uad_plugins.imaging import ImageError
from uad_plugins.runtime import Detector


def test_a_category_has_its_own_threshold(bundle):
    grey = np.full((64, 64, 3), 128, np.uint8)
    with Detector(bundle) as detector:
        own, pooled = detector.predict(grey, category="washer"), detector.predict(grey)
        assert (own.threshold, pooled.threshold) == (detector.thresholds.of("washer"), detector.thresholds.of(None))
        assert pooled.threshold <= max(detector.thresholds.of(name) for name in detector.categories)
        with pytest.raises(UsageError, match="unknown category 'washr'"):
            detector.predict(grey, category="washr")
        with pytest.raises(UsageError, match="unknown category"):
            next(detector.stream([grey], category="washr"))


@pytest.mark.parametrize(("station", "engine"), [("bundle", "openvino"), ("onnx_bundle", "onnxruntime")])
def test_a_score_that_is_no_number_is_an_error_in_predict_and_in_a_stream(request, station, engine, monkeypatch):
    from uad_plugins.runtime.onnxruntime_detector import OnnxRuntimeDetector
    from uad_plugins.runtime.openvino_detector import _Request

    folder, nothing = request.getfixturevalue(station), (float("nan"), np.zeros((64, 64), np.float32))
    monkeypatch.setattr(_Request, "result", lambda self: nothing)
    monkeypatch.setattr(OnnxRuntimeDetector, "run", lambda self, image: nothing)
    grey = np.full((64, 64, 3), 128, np.uint8)
    with Detector(folder, engine) as detector:
        for result in (detector.predict(grey), *detector.stream([grey])):
            assert (result.verdict, result.error) == ("error", "the model's score is not a finite number")
            assert result.map is None


def test_without_a_threshold_there_is_no_verdict(bundle, products, tmp_path, capsys):
    """One behaviour at every station, and JSON that others can read."""
    from uadx.app import main

    folder = Path(shutil.copytree(bundle, tmp_path / "bare"))
    manifest = Bundle.open(folder).manifest
    unset = manifest.thresholds.model_copy(
        update={"pooled": manifest.thresholds.pooled.model_copy(update={"value": None}), "categories": {}}
    )
    seal(folder, manifest.model_copy(update={"thresholds": unset}))
    image = str(sorted((products / "washer" / "test" / "good").iterdir())[0])
    with Detector(folder) as detector:
        for result in (detector.predict(image, category="washer"), *detector.stream([image])):
            assert (result.verdict, result.threshold, result.error) == ("no threshold", None, "")

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, words)])
        assert not stopped.value.code
        return capsys.readouterr().out

    (row,) = json.loads(run("predict", folder, image, "--json"))["predictions"]
    assert (row["verdict"], row["threshold"]) == ("no threshold", None)
    assert run("predict", folder, image).startswith("no threshold ")
    report = json.loads(run("evaluate", folder, products, "--out", tmp_path / "out", "--json"))
    assert report["decisions"]["washer"] == {"threshold": None, "false_positive_rate": None, "true_positive_rate": None}


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), 7, None]
)
def test_what_is_no_image_is_refused(bundle, wrong):
    with Detector(bundle) as detector:
        with pytest.raises(ImageError, match="neither a path"):
            detector.predict(wrong)
        (result,) = detector.stream([wrong])
        assert result.verdict == "error"
        assert result.map is None
