"""The command line: what it finds in folders and on the machine, and where it writes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from uad_plugins.errors import UadxError
from uad_plugins.evaluation.overlays import is_overlay, save_overlay
from uad_plugins.evaluation.predict import find_images


def test_heat_maps_are_known_wherever_one_stands(uadx, products, bundle, tmp_path, monkeypatch):
    """From another working folder, after another call has replaced predictions.csv, and moved to another place."""
    folder = shutil.copytree(products / "washer" / "test" / "good", tmp_path / "here" / "images")
    known = sorted(path.name for path in folder.iterdir())

    def predicted(*words):
        status, out, err = uadx("predict", bundle, *words, "--json")
        assert status == 0, err
        return sorted(row["path"] for row in json.loads(out)["predictions"])

    monkeypatch.chdir(tmp_path / "here")
    assert predicted("images", "--out", "images") == [f"images/{name}" for name in known]
    monkeypatch.chdir(tmp_path)
    assert predicted("here/images", "--out", "here/images") == [f"here/images/{name}" for name in known]
    predicted(folder / known[0], "--out", folder)
    assert predicted(folder, "--out", folder) == [str(folder / name) for name in known]
    assert predicted("here/*/*.png") == [f"here/images/{name}" for name in known]
    moved = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("*.csv"))
    assert predicted(moved) == [str(moved / name) for name in known]
    # Asked for by its name it is one.
    heat = next(str(path) for path in moved.iterdir() if path.name not in known)
    assert predicted(moved, heat) == sorted([*(str(moved / name) for name in known), heat])


def test_a_folder_of_heat_maps_alone_holds_no_image(uadx, products, bundle, tmp_path):
    assert uadx("predict", bundle, products / "washer" / "test" / "good", "--out", tmp_path / "maps")[0] == 0
    status, _, err = uadx("predict", bundle, tmp_path / "maps")
    assert (status, err.splitlines()[0]) == (2, "error: no image to predict")
    assert "heat maps only where the file itself is named" in err


def test_a_folder_without_images_is_named_beside_those_that_have_some(uadx, products, bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = uadx("predict", bundle, tmp_path / "empty", products / "washer" / "test" / "good")
    assert (status, err.splitlines()[0]) == (
        0,
        f"note: no image in {tmp_path / 'empty'}; heat maps of earlier calls are none",
    )


def test_a_heat_map_is_told_by_its_mark_alone(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8))
    save_overlay(picture, tmp_path / "deep" / "heat.png")
    assert is_overlay(tmp_path / "deep" / "heat.png")
    with Image.open(tmp_path / "deep" / "heat.png") as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(picture))
    picture.save(tmp_path / "part_map.png")
    picture.save(tmp_path / "part.JPG")
    (tmp_path / "bad.png").write_bytes(b"uadx")
    (tmp_path / "empty.png").touch()
    others = sorted(str(path) for path in tmp_path.glob("*.*"))
    assert not any(map(is_overlay, [*others, str(tmp_path / "gone.png")]))
    # What cannot be read stays, and gets an error in its row.
    assert find_images([str(tmp_path)]) == others


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    # Nothing was written to a folder that is called "~".
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_synthetic_products_in_the_home_folder(uadx, home):
    words = ("--size", 32, "--train", 2, "--test", 0, "--product", "washer")
    assert uadx("data", "synth", "~/d", *words)[:2] == (0, f"{home / 'd'}\n")
    assert sum(1 for _ in (home / "d").rglob("*.png")) == 2


def test_a_quickstart_in_the_home_folder(uadx, home, monkeypatch):
    def begun(out, **_):
        raise UadxError(f"begun in {out}")

    monkeypatch.setattr("uad_plugins.quickstart.run_quickstart", begun)
    assert uadx("quickstart", "--out", "~/q") == (1, "", f"error: begun in {home / 'q'}\n")


def test_a_teacher_in_the_home_folder(uadx, home, monkeypatch):
    from uad_plugins.models.uninformed_students import teachers

    words = ("teacher", "distill", "procedural", "--weights", "bundled", "--out", "~/t.safetensors")
    written = []
    record = teachers.TeacherRecord(**dict.fromkeys(teachers.TeacherRecord.__dataclass_fields__, 0))
    monkeypatch.setattr(teachers, "distilled_teacher", lambda *_, **__: (None, record))
    monkeypatch.setattr(teachers, "save_teacher", lambda teacher, record, path, dtype: written.append(path))
    assert uadx(*words)[0] == 0
    assert written == [home / "t.safetensors"]
    home.mkdir()
    written[0].touch()
    assert f"error: {home / 't.safetensors'}: exists\n" in uadx(*words)[2]


def test_wrong_settings_delete_no_earlier_quickstart(tmp_path):
    from uad_plugins.quickstart import MARK, run_quickstart

    (tmp_path / "q" / "run").mkdir(parents=True)
    for name in (MARK, "report.html"):
        (tmp_path / "q" / name).touch()
    for out in (tmp_path / "q", tmp_path / "new"):
        with pytest.raises(UadxError, match="image_size"):
            run_quickstart(out, overwrite=True, side=16, tell=lambda _: None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([MARK, "q", "report.html", "run"])
