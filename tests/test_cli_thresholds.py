"""``uadx thresholds``: from images that were not trained on, for the products that are there."""

import json
import shutil
from pathlib import Path

import pytest
from runs import small_config

from uad_plugins.artifacts import Run, read_json
from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import hold_out
from uad_plugins.data.unseen import unseen
from uad_plugins.errors import UadxError
from uad_plugins.training.train import train


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_dry_run_stores_nothing(uadx, products, trained, run, tmp_path):
    before = (run / "thresholds.json").read_text()
    other = shutil.copytree(products, tmp_path / "labelled")
    (other / "fabric" / "train" / "good" / "0000.png").unlink()
    status, out, err = uadx("thresholds", run, other, "--method", "best-f1", "--dry-run", "--json")
    assert status == 0, err
    assert json.loads(out)["method"] == "best-f1"
    assert (run / "thresholds.json").read_text() == before


@pytest.mark.parametrize("place", ["as it was", "by a link", "a copy"])
def test_of_the_data_trained_on_the_held_out_images_are_taken(uadx, products, run, tmp_path, place):
    data = products
    if place == "by a link":
        data = tmp_path / "link"
        data.symlink_to(products)
    if place == "a copy":
        data = shutil.copytree(products, tmp_path / "copy")
    status, out, err = uadx("thresholds", run, data, "--target-fpr", "0.2", "--json")
    assert status == 0, err
    assert json.loads(out) == read_json(run / "thresholds.json")
    assert json.loads(out)["source"] == "3 normal images held out from training"
    assert "the images held out from training are used" in err


def test_products_that_are_not_there_keep_their_thresholds(uadx, products, run, tmp_path):
    before = read_json(run / "thresholds.json")
    data = tmp_path / "more"
    shutil.copytree(products / "fabric", data / "fabric")
    status, out, err = uadx("thresholds", run, data, "--json")
    assert status == 0, err
    after = json.loads(out)
    assert after == read_json(run / "thresholds.json")
    assert after["categories"]["fabric"]["normal"] == 14
    assert {n: after["categories"][n] for n in ("connector", "washer")} == {
        n: before["categories"][n] for n in ("connector", "washer")
    }
    assert after["pooled"] == before["pooled"]
    assert after["source"] == f"14 normal images of {data}; kept as they were: connector, washer, pooled"
    assert err.endswith("note: not measured, and kept as they were: connector, washer, pooled\n")


def test_products_that_were_not_trained_on_set_no_threshold(uadx, products, run, tmp_path):
    """Neither one of their own nor the pooled one; alone they get one, and are judged by it."""
    data = tmp_path / "new"
    for name, source in {"fabric": "fabric", "connector": "connector", "washer": "washer", "linen": "fabric"}.items():
        shutil.copytree(products / source, data / name)
    status, out, err = uadx("thresholds", run, data, "--json")
    assert status == 0, err
    assert "note: not trained on, and left out: linen\n" in err
    found = json.loads(out)
    assert sorted(found["categories"]) == ["connector", "fabric", "washer"]
    assert found["pooled"]["normal"] == sum(each["normal"] for each in found["categories"].values())
    for name in ("fabric", "connector", "washer"):
        shutil.rmtree(data / name)
    assert "linen" in json.loads(uadx("thresholds", run, data, "--json")[1])["categories"]
    assert "'linen' was not trained on; it is judged by a threshold of its own\n" in uadx("evaluate", run, data, "--json")[2]


def test_images_that_cannot_be_read_are_named(uadx, products, run, tmp_path):
    good = shutil.copytree(products / "fabric", tmp_path / "new" / "fabric") / "train" / "good"
    before, files = read_json(run / "thresholds.json"), sorted(good.iterdir())
    shutil.rmtree(good.parent.parent / "test")
    files[0].write_bytes(b"")
    status, out, err = uadx("thresholds", run, tmp_path / "new", "--json")
    assert status == 1
    assert f"warning: {files[0]}: empty file\n" in err
    assert json.loads(out)["categories"]["fabric"]["normal"] == len(files) - 1
    assert read_json(run / "thresholds.json") == json.loads(out) != before
    for file in files:
        file.write_bytes(b"")
    status, _, err = uadx("thresholds", run, tmp_path / "new")
    assert status == 1
    assert err.startswith(f"error: no image to set a threshold from can be read: {files[0]}: empty file\n")
    assert read_json(run / "thresholds.json") == json.loads(out)


def test_images_trained_on_are_left_out_of_a_part_of_the_data(uadx, products, run):
    status, out, err = uadx("thresholds", run, products / "fabric", "--json", "--dry-run")
    assert status == 0, err
    # One was held out; the four of the test split are not to set anything.
    assert json.loads(out)["categories"]["fabric"]["normal"] == 1
    assert "note: the run was trained on or is tested with 17 of these images: left out\n" in err


def test_data_that_has_changed_is_refused_where_the_training_noted_no_names(uadx, products, tmp_path, picture):
    data = shutil.copytree(products, tmp_path / "data")
    train(small_config({"trainer": {"max_epochs": 1}}), data, tmp_path / "run", interactive=False)
    picture(data / "fabric" / "train" / "good" / "new.png", size=(64, 64))
    before = {path: Path(data, path) for path in Run(tmp_path / "run").held_out()}
    samples, chosen, held_out = unseen(str(data), None, Run(tmp_path / "run").source())
    assert held_out
    assert {Path(samples.paths[int(index)]) for index in chosen} == set(before.values())
    status, _, err = uadx("thresholds", tmp_path / "run", data, "--dry-run")
    assert status == 0, err
    Run(tmp_path / "run").split_file.unlink()
    status, _, err = uadx("thresholds", tmp_path / "run", data)
    assert status == 1
    assert err.startswith(f"error: {data}: has changed since it was trained on: which of its images were held out is not")
    # What lies in a part of it may have been trained on or held out, and what is tested with sets nothing.
    samples, chosen, held_out = unseen(str(data / "fabric"), None, Run(tmp_path / "run").source())
    assert not held_out
    assert len(chosen) == 0
    # Nothing is known of what has moved.
    elsewhere = {**Run(tmp_path / "run").source(), "data": str(tmp_path / "gone")}
    samples, chosen, held_out = unseen(str(data / "fabric"), None, elsewhere)
    assert (len(chosen), held_out) == (len(samples), False)


def test_a_quantized_model_that_knows_no_fingerprint_recognises_the_place(products, trained):
    origin = {**Run(trained).source(), "fingerprint": None, "held_out": None}
    samples, chosen, held_out = unseen(str(products), None, origin)
    assert held_out
    expected = hold_out(scan(products), 0.1, 0).where(split="val")
    assert chosen.tolist() == expected.tolist()
    assert len(samples) == len(scan(products))


def test_the_layout_that_was_named_for_training_is_taken_again(products, trained, tmp_path):
    data = shutil.copytree(products, tmp_path / "copy")
    image = next((data / "fabric" / "train" / "good").iterdir())
    (data / "index.csv").write_text(f"path,category,split,label\n{image},fabric,train,0\n")
    origin = Run(trained).source()
    assert len(unseen(str(data), None, origin)[0]) == 1
    samples, chosen, held_out = unseen(str(data), None, {**origin, "layout": "mvtec"})
    assert (len(samples), len(chosen), held_out) == (len(scan(products)), 3, True)


def test_a_layout_that_there_is_not_is_named(uadx, products, run):
    status, _, err = uadx("thresholds", run, products, "--layout", "mvtc")
    assert (status, err.splitlines()[0]) == (2, "error: unknown layout 'mvtc'")


def test_data_without_an_unseen_image_is_refused(uadx, products, run, tmp_path):
    rows = [s for s in hold_out(scan(products), 0.1, 0) if s.split == "train"]
    index = tmp_path / "index.jsonl"
    index.write_text(
        "\n".join(json.dumps({"path": s.path, "category": s.category, "split": "train", "label": 0}) for s in rows)
    )
    status, _, err = uadx("thresholds", run, index)
    assert status == 1
    assert "error: no normal image to set a threshold from\n" in err
    with pytest.raises(UadxError, match="no such file or folder"):
        unseen(str(tmp_path / "nowhere"), None, Run(run).source())


def test_lost_thresholds_are_set_anew(uadx, products, run):
    """Until then images get a score and no verdict."""
    before, picture = read_json(run / "thresholds.json"), next((products / "fabric" / "test" / "good").iterdir())
    (run / "thresholds.json").write_text("{")
    for words in (["predict", run, picture], ["thresholds", run, products]):
        status, out, err = uadx(*words)
        assert (status, out) == (1, "")
        assert err.splitlines()[-1] == "hint: remove it, and set them anew: uadx thresholds"
    (run / "thresholds.json").unlink()
    status, out, err = uadx("predict", run, picture, "--json")
    (row,) = json.loads(out)["predictions"]
    assert (status, row["threshold"], row["verdict"]) == (0, None, "no threshold"), err
    assert row["score"] > 0
    shutil.copytree(products / "fabric", run / "some" / "fabric")
    status, out, err = uadx("thresholds", run, run / "some", "--json")
    assert status == 0, err
    # There is no earlier one to keep for images of any product.
    assert list(json.loads(out)["categories"]) == ["fabric"]
    status, _, err = uadx("thresholds", run, products, "--target-fpr", "0.01")
    assert status == 0, err
    assert read_json(run / "thresholds.json") == before
