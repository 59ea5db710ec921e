"""The table of samples, and holding images out of training."""

from __future__ import annotations

import gc
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import PackedStrings, Sample, SampleTable, hold_out, in_test_share, relative_to
from uad_plugins.errors import UadxError, UsageError


def samples(root, counts, label=0, split="train"):
    return [
        Sample(f"{root}/{category}/{split}/{number:03d}.png", category, label, split)
        for category, count in counts.items()
        for number in range(count)
    ]


def table(root="/data", **counts):
    return SampleTable(samples(root, counts), Path(root))


def held_out(of):
    return [of.relative(int(index)) for index in of.where(split="val")]


@pytest.fixture
def mixed():
    return SampleTable(
        [
            Sample("/d/nut/b.png", "nut", 1, "test", "", "bent"),
            Sample("/d/bolt/z.png", "bolt", 0, "train", "", "good"),
            Sample("/d/bolt/a.png", "bolt", 1, "test", "/d/bolt/a_mask.png", "crack"),
            Sample("/d/nut/a.png", "nut", 0, "train", "", "good"),
            Sample("/d/bolt/m.png", "bolt", 0, "val", "", "good"),
        ],
        Path("/d"),
    )


@pytest.mark.parametrize("strings", [[], [""], ["", "", ""], ["a", "", "ñandú 日本", os.fsdecode(b"\xff.png"), "last"]])
def test_packed_strings_give_back_what_went_in(strings):
    packed = PackedStrings(strings)
    assert list(packed) == strings
    assert [packed[i - len(strings)] for i in range(len(strings))] == strings
    assert list(pickle.loads(pickle.dumps(packed))) == strings


def test_many_images_are_indexed_unopened_and_kept_in_little_memory(tmp_path, monkeypatch):
    """The path, and less than 40 bytes for each image; as little goes to a worker process."""
    folders = [tmp_path / category / "train" / "good" for category in ("bolt", "nut")]
    for folder in folders:
        folder.mkdir(parents=True)
        for number in range(5000):
            (folder / f"{number:05d}.png").touch()
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
    scan(tmp_path)
    tracemalloc.start()
    try:
        table = hold_out(scan(tmp_path), 0.1, 0)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    paths = sum(len(path) for path in table.paths)
    assert len(table) == 10_000
    assert max(kept, len(pickle.dumps(table))) < paths + 40 * len(table)


def test_a_table_is_ordered_by_category_and_path(mixed):
    assert [s.path for s in mixed] == ["/d/bolt/a.png", "/d/bolt/m.png", "/d/bolt/z.png", "/d/nut/a.png", "/d/nut/b.png"]
    assert mixed.categories == ["bolt", "nut"]
    assert mixed.category_index.tolist() == [0, 0, 0, 1, 1]
    assert mixed.labels.tolist() == [1, 0, 0, 0, 1]
    assert mixed.has_mask.tolist() == [True, False, False, False, False]


def test_a_table_gives_back_whole_samples_from_both_ends(mixed):
    assert mixed[0] == Sample("/d/bolt/a.png", "bolt", 1, "test", "/d/bolt/a_mask.png", "crack")
    assert mixed[-1] == mixed[4] == Sample("/d/nut/b.png", "nut", 1, "test", "", "bent")
    for index in (5, -6):
        with pytest.raises(IndexError):
            mixed[index]


@pytest.mark.parametrize(
    ("criteria", "indices"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"split": "train"}, [2, 3]),
        ({"category": "nut"}, [3, 4]),
        ({"label": 1}, [0, 4]),
        ({"split": "test", "category": "bolt", "label": 1}, [0]),
        ({"split": "val", "label": 1}, []),
    ],
)
def test_where_combines_criteria(mixed, criteria, indices):
    assert mixed.where(**criteria).tolist() == indices


def test_only_and_without_give_smaller_tables(mixed):
    assert mixed.masked_categories() == ["bolt"]
    assert list(mixed.only(["nut"])) == [mixed[3], mixed[4]]
    assert mixed.only(["nut"]).category_index.tolist() == [0, 0]
    assert list(mixed.without({"/d/bolt/m.png", "/elsewhere.png"})) == [mixed[0], mixed[2], mixed[3], mixed[4]]
    with pytest.raises(UsageError, match=r"unknown category 'blot' \(did you mean 'bolt'\? known: bolt, nut\)"):
        mixed.only(["blot"])


def test_an_empty_table_is_a_table():
    empty = SampleTable([], Path("/d"))
    assert (len(empty), list(empty), empty.categories, empty.masked_categories()) == (0, [], [], [])


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/d/a/b.png", "/d", "a/b.png"),
        ("/data/b.png", "/d", "/data/b.png"),
        ("/b.png", "/", "b.png"),
        ("/other/b.png", "/d", "/other/b.png"),
        ("C:\\d\\a\\b.png", "C:\\d", "a/b.png"),
    ],
)
def test_paths_are_shown_relative_to_the_root_they_lie_below(path, root, expected):
    assert relative_to(path, Path(root)) == expected


def test_the_fingerprint_depends_on_the_data_and_not_on_its_place():
    here = table("/data", bolt=5)
    assert here.fingerprint() == table("/mnt/copy", bolt=5).fingerprint()
    assert here.fingerprint() == table("/data", bolt=5).fingerprint()
    assert len({t.fingerprint() for t in (here, table(bolt=6), table(nut=5), hold_out(here, 0.2, 0))}) == 4


def test_held_out_images_leave_training_and_nothing_else_changes():
    before = SampleTable(
        [*samples("/data", {"bolt": 20, "nut": 7}), *samples("/data", {"bolt": 3}, 1, "test")], Path("/data")
    )
    after = hold_out(before, 0.2, seed=0)
    parts = {split: {after[int(i)].path for i in after.where(split=split)} for split in ("train", "val", "test")}
    assert [len(parts[split]) for split in ("train", "val", "test")] == [22, 5, 3]
    assert set.union(*parts.values()) == set(before.paths)
    assert [len(after.where(split="val", category=name)) for name in after.categories] == [4, 1]
    assert [(s.path, s.category, s.label) for s in after] == [(s.path, s.category, s.label) for s in before]


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(2, 0.01, 1), (2, 0.99, 1), (5, 0.01, 1), (5, 0.99, 4), (40, 0.1, 4)]
)
def test_at_least_one_image_is_held_out_and_one_stays(count, fraction, held):
    after = hold_out(table(bolt=count), fraction, seed=3)
    assert (len(after.where(split="val")), len(after.where(split="train"))) == (held, count - held)


def test_what_is_held_out_depends_on_names_and_seed_and_not_on_the_place():
    here = held_out(hold_out(table("/data", bolt=40, nut=30), 0.2, seed=7))
    assert here == held_out(hold_out(table("/mnt/elsewhere/copy", bolt=40, nut=30), 0.2, seed=7))
    assert here != held_out(hold_out(table("/data", bolt=40, nut=30), 0.2, seed=8))


def test_of_a_products_own_folder_the_same_images_are_held_out(products):
    whole, alone = (hold_out(scan(root), 0.3, seed=1) for root in (products, products / "washer"))
    names = [name for name in held_out(whole) if name.startswith("washer/")]
    assert [f"washer/{name}" for name in held_out(alone)] == names
    assert len(names) == 3


def test_a_copied_tree_has_the_same_images_held_out(products, tmp_path):
    import shutil

    from uad_plugins.data.layouts import scan

    copy = shutil.copytree(products, tmp_path / "somewhere else")
    assert held_out(hold_out(scan(copy), 0.3, seed=1)) == held_out(hold_out(scan(products), 0.3, seed=1))
    assert len(held_out(hold_out(scan(copy), 0.3, seed=1))) == 9


def test_held_out_images_stay_so_when_others_come_and_go():
    whole = table(bolt=40)
    before = held_out(hold_out(whole, 0.25, seed=0))
    trained = [f"/data/{name}" for name in map(whole.relative, range(40)) if name not in before]
    fewer = held_out(hold_out(whole.without({trained[0]}), 0.25, seed=0))
    assert fewer == before
    # One more image of 40 does not change the count, so at most one held-out image makes room for it.
    more = SampleTable([*whole, Sample("/data/bolt/train/new.png", "bolt", 0, "train")], Path("/data"))
    assert len(set(held_out(hold_out(more, 0.25, seed=0))) & set(before)) >= len(before) - 1


def test_a_category_with_its_own_validation_images_keeps_them():
    given = SampleTable([*samples("/data", {"bolt": 9, "nut": 9}), *samples("/data", {"bolt": 2}, 0, "val")], Path("/data"))
    after = hold_out(given, 0.5, seed=0)
    bolt = after.where(split="val", category="bolt")
    assert [after.relative(int(i)) for i in bolt] == ["bolt/val/000.png", "bolt/val/001.png"]
    assert len(after.where(split="val", category="nut")) == 4


def test_a_category_without_training_images_is_left_alone():
    given = SampleTable([*samples("/data", {"bolt": 4}), *samples("/data", {"nut": 2}, 0, "test")], Path("/data"))
    assert hold_out(given, 0.25, seed=0).where(category="nut", split="test").size == 2


def test_anomalous_training_images_are_refused_by_name():
    wrong = SampleTable([*samples("/data", {"nut": 3}), *samples("/data", {"bolt": 2}, label=1)], Path("/data"))
    with pytest.raises(UadxError) as error:
        hold_out(wrong, 0.1, seed=0)
    assert error.value.message == "bolt/train/000.png: anomalous image in the training split (2 in all)"


def test_a_single_training_image_is_refused_by_category():
    with pytest.raises(UadxError) as error:
        hold_out(table(bolt=5, nut=1), 0.1, seed=0)
    assert error.value.message == "category 'nut' has one training image: none is left to hold out"


def test_the_test_share_of_a_layout_without_splits_is_about_what_was_asked():
    chosen = np.mean([in_test_share(f"bolt/good/{number}", 0.2) for number in range(5000)])
    assert chosen == pytest.approx(0.2, abs=0.02)
    assert [in_test_share("a", share) for share in (0.0, 1.0)] == [False, True]
