"""Files named in bytes that are not UTF-8: nothing is lost that was computed, and every file written is valid."""

import csv
import json
import os
import shutil

import pytest
from runs import small_run

from uad_plugins.artifacts import read_json

ODD = os.fsdecode(b"part\xff.png")


@pytest.fixture
def data(products, tmp_path):
    """The products; a test image, a defect, a category and a bad training image have odd names."""
    data = shutil.copytree(products, tmp_path / "data")
    good = data / "washer" / "test" / "good"
    sorted(good.iterdir())[0].rename(good / ODD)
    defect = next(folder for folder in sorted((data / "washer" / "test").iterdir()) if folder.name != "good")
    defect.rename(defect.with_name(os.fsdecode(b"kr\xe4tzer")))
    (data / "connector").rename(data / os.fsdecode(b"stecker\xe4"))
    (data / "fabric" / "train" / "good" / ODD).write_bytes(b"bad")
    return data


def test_predictions_are_written(uadx, trained, data, tmp_path):
    good = data / "washer" / "test" / "good"
    status, out, err = uadx("predict", trained, good, "--category", "washer", "--out", tmp_path / "maps")
    assert status == 0, err
    assert f"{good}/part\\udcff.png" in out
    with (tmp_path / "maps" / "predictions.csv").open(encoding="utf-8") as file:
        assert f"{good}/part\\udcff.png" in [row["path"] for row in csv.DictReader(file)]
    status, out, err = uadx("predict", trained, good, "--category", "washer", "--json")
    assert status == 0, err
    assert str(good / ODD) in [row["path"] for row in json.loads(out)["predictions"]]


def test_they_are_trained_on_and_measured(uadx, trained, data, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    small_run(data, run, {"data": {"skip_bad": True}, "trainer": {"max_epochs": 1}}, overwrite=True)
    assert list(read_json(run / "skipped.json")) == [str(data / "fabric" / "train" / "good" / ODD)]
    assert os.fsdecode(b"stecker\xe4") in read_json(run / "thresholds.json")["categories"]
    status, out, err = uadx("evaluate", run, data, "--out", tmp_path / "report")
    assert status == 0, err
    assert "stecker\\udce4" in out
    for name in ("report.html", "scores.csv", "report.json"):
        assert "stecker\\udce4" in (tmp_path / "report" / name).read_text(encoding="utf-8")
    status, out, err = uadx("quantize", run, "--samples", 9, "--out", tmp_path / "int8", "--json")
    assert status == 0, err
    assert json.loads(out)["calibration"]["images"] == {"fabric": 3, os.fsdecode(b"stecker\xe4"): 3, "washer": 3}
    bundle = tmp_path / "bundle"
    status, out, err = uadx("deploy", tmp_path / "int8", "--target", "openvino-cpu", "--out", bundle, "--json")
    assert status == 0, err
    assert os.fsdecode(b"stecker\xe4") in json.loads(out)["categories"]
    (bundle / "bundle.json").read_text(encoding="utf-8")
    assert "stecker\\udce4" in (bundle / "README.md").read_text(encoding="utf-8")
    status, out, err = uadx("predict", bundle, data / "washer" / "test" / "good", "--category", os.fsdecode(b"stecker\xe4"))
    assert status == 0, err
    status, out, err = uadx("data", "check", data)
    assert status == 1
    assert "part\\udcff.png" in out
