"""The synthetic products: the same seed, the same data; masks where and only where there is a defect."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uad_plugins.data.layouts import recognise, scan
from uad_plugins.data.products.catalogue import PRODUCTS
from uad_plugins.data.products.synthesis import make_part, synthesize
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.imaging import read_mask

DEFECTS = [(name, defect) for name, product in PRODUCTS.items() for defect in product.defects]


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def small(out, **options):
    return synthesize(out, **{"products": ["fabric"], "side": 32, "train": 2, "test": 1, **options})


def test_a_folder_that_is_there_is_filled(tmp_path, monkeypatch):
    """Be it where one is, or where a link leads."""
    expected = tree(small(tmp_path / "new"))
    for name in ("here", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "here")
    assert tree(small(Path())) == expected
    assert tree(small(tmp_path / "link")) == expected
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["fabric"]
    with pytest.raises(UadxError, match="exists and is not an empty folder"):
        small(Path())


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_every_defect_is_visible_and_marked(name, defect, side):
    for part in range(8):
        image, mask = make_part(PRODUCTS[name], part, side, defect)
        good, nothing = make_part(PRODUCTS[name], part, side, None)
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((side, side, 3), np.uint8, (side, side), np.bool_)
        assert not nothing.any()
        assert 0.003 < mask.mean() < 0.3
        change = np.abs(image.astype(int) - good).mean(axis=2)
        assert change[mask].mean() > 4 * change[~mask].mean()


@pytest.mark.parametrize("name", PRODUCTS)
def test_parts_differ_and_repeat_by_their_number(name):
    first, again, other = (make_part(PRODUCTS[name], part, 32, None)[0] for part in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_the_data_set_has_the_counts_asked_for(products):
    table = scan(products)
    assert recognise(products).name == "mvtec"
    assert Counter((s.category, s.split, s.defect) for s in table) == {
        **{(name, "train", "good"): 10 for name in PRODUCTS},
        **{(name, "test", "good"): 4 for name in PRODUCTS},
        **{(name, "test", defect): 1 for name, defect in DEFECTS},
    }
    with Image.open(table[0].path) as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")


def test_defective_images_alone_have_masks_and_those_mark_something(products):
    table = scan(products)
    assert [bool(s.mask) for s in table] == [s.label == 1 for s in table]
    assert all(read_mask(s.mask).any() for s in table if s.mask)


def test_defects_are_shared_out_evenly(tmp_path):
    table = scan(small(tmp_path / "out", test=6))
    assert Counter(s.defect for s in table if s.label) == {"stain": 2, "scratch": 2, "hole": 1, "pulled_thread": 1}


def test_the_same_seed_makes_the_same_files_and_another_does_not(tmp_path):
    one, two, three = (tree(small(tmp_path / str(n), seed=seed)) for n, seed in enumerate((5, 5, 6)))
    assert one == two
    assert one.keys() == three.keys()
    assert not [name for name in one if "mask" not in name and one[name] == three[name]]


def test_a_product_is_the_same_alone_or_among_others(tmp_path):
    alone = tree(small(tmp_path / "alone"))
    both = tree(small(tmp_path / "both", products=["washer", "fabric"]))
    assert alone == {name: content for name, content in both.items() if name.startswith("fabric/")}


def test_no_two_images_are_alike(products):
    contents = [path.read_bytes() for part in ("train", "test") for path in products.glob(f"*/{part}/*/*.png")]
    assert len(set(contents)) == len(contents) == 54


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    assert tree(small(tmp_path / "empty")) == tree(small(tmp_path / "not" / "there" / "yet"))


def test_test_images_may_be_left_out(tmp_path):
    assert sorted(tree(small(tmp_path / "out", test=0))) == ["fabric/train/good/0000.png", "fabric/train/good/0001.png"]


def test_progress_counts_every_image(tmp_path):
    calls = []
    small(tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("occupied", ["folder", "file"])
def test_what_exists_is_never_overwritten(tmp_path, occupied):
    out = tmp_path / "out"
    kept = out
    if occupied == "folder":
        out.mkdir()
        kept = out / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(UadxError) as error:
        small(out)
    assert error.value.message == f"{out}: exists and is not an empty folder"
    assert kept.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("name", "number", "least"), [("side", 31, 32), ("train", 1, 2), ("test", -1, 0)])
def test_numbers_without_sense_are_refused_before_anything_is_made(tmp_path, name, number, least):
    with pytest.raises(UsageError, match=f"{name} of a synthetic data set must be at least {least}, not {number}"):
        small(tmp_path / "out", **{name: number})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_product_suggests_the_nearest(tmp_path):
    with pytest.raises(UsageError) as error:
        small(tmp_path / "out", products=["fabrik"])
    assert error.value.message == "unknown product 'fabrik'"
    assert error.value.hint == "did you mean 'fabric'? known: connector, fabric, washer"


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, failure):
    def fail(done, total):
        if done == 3:
            raise failure

    with pytest.raises(type(failure)):
        small(tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []
