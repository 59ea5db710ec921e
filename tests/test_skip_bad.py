"""Training without images that cannot be read: others are held out in their place, and no product is lost unsaid."""

import shutil
from pathlib import Path

import pytest
from runs import small_config, small_run

from uad_plugins.artifacts import Run, read_json
from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import hold_out
from uad_plugins.data.unseen import unseen
from uad_plugins.errors import UadxError
from uad_plugins.training.train import train

SKIP = {"data": {"skip_bad": True}, "trainer": {"max_epochs": 1}}


@pytest.fixture
def data(products, tmp_path):
    return shutil.copytree(products, tmp_path / "data")


def spoil(data, split, category=None, keep=0):
    """Empty the files of one part of the data, all but some, and return their paths."""
    table = hold_out(scan(data), 0.1, 0)
    paths = [table.paths[int(i)] for i in table.where(split=split, category=category)]
    paths = paths[: len(paths) - keep]
    for path in paths:
        Path(path).write_bytes(b"")
    return paths


def test_they_are_left_out_recorded_and_said(data, tmp_path):
    (victim, *_) = spoil(data, "train", "fabric", keep=8)
    said = []
    metrics = small_run(data, tmp_path / "run", SKIP, tell=said.append)
    skipped = tmp_path / "run" / "skipped.json"
    assert list(read_json(skipped)) == [victim]
    assert said == [f"note: images left out that cannot be read: 1, see {skipped}"]
    assert Run(tmp_path / "run").manifest().data["skipped"] == 1
    assert metrics["samples_seen"] == 26


def test_others_are_held_out_in_the_place_of_bad_ones(data, tmp_path):
    """Every product has a threshold of its own; the choice is the same again, and known wherever the data lies."""
    bad = set(spoil(data, "val"))
    small_run(data, tmp_path / "run", SKIP)
    run = Run(tmp_path / "run")
    assert sorted(read_json(run.thresholds_file)["categories"]) == ["connector", "fabric", "washer"]
    assert {name: counts["val"] for name, counts in run.manifest().data["counts"].items()} == dict.fromkeys(
        ["connector", "fabric", "washer"], 1
    )
    assert not {str(data / name) for name in run.held_out()} & bad
    small_run(data, tmp_path / "again", SKIP)
    assert Run(tmp_path / "again").held_out() == run.held_out()
    table, chosen, known = unseen(str(shutil.copytree(data, tmp_path / "moved")), None, run.source())
    assert known
    assert {table.relative(int(index)) for index in chosen} == run.held_out()
    given = {"trainer": {"max_epochs": 2}}
    before = run.held_out()
    metrics = train(small_config(given), data, run.folder, given=given, resume=True, interactive=False)
    assert (metrics["epochs"], run.held_out()) == (2, before)


def test_what_was_trained_on_is_not_held_out_when_training_goes_on(data, trained, tmp_path):
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    before, manifest = run.held_out(), run.manifest()
    spoil(data, "val", "washer")
    given = {"data": {"skip_bad": True}, "trainer": {"max_epochs": 3}}
    with pytest.raises(UadxError) as error:
        train(small_config(given), data, run.folder, given=given, resume=True, interactive=False)
    assert error.value.message == "category 'washer': none of its images held out from training can be read (1 in all)"
    assert (run.held_out(), run.manifest()) == (before, manifest)


def test_a_product_without_a_readable_image_is_refused_before_anything_is_replaced(data, trained, tmp_path):
    spoil(data, "train", "fabric")
    spoil(data, "val", "fabric")
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    with pytest.raises(UadxError) as error:
        small_run(data, run, SKIP, overwrite=True)
    assert error.value.message == "category 'fabric': none of its training images can be read (9 in all)"
    assert "--category" in error.value.hint
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_a_product_with_one_readable_image_is_refused(data, tmp_path):
    spoil(data, "train", "fabric")
    with pytest.raises(UadxError, match="category 'fabric' has one training image: none is left to hold out"):
        small_run(data, tmp_path / "run", SKIP)
