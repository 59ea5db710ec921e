"""Layouts: which files are samples, what they are, and how the row or folder that is wrong gets named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from uad_plugins.data.layouts import recognise, scan, usual_layout
from uad_plugins.data.samples import Sample, relative_to
from uad_plugins.errors import UadxError, UsageError


@pytest.fixture(autouse=True)
def no_image_is_opened(monkeypatch):
    """Indexing lists folders: every test here holds without opening a single image."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"opened an image: {args}")

    monkeypatch.setattr(Image, "open", refuse)


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def rows(table):
    """The table as readable rows: (path, category, label, split, mask, defect)."""
    return [
        (table.relative(i), s.category, s.label, s.split, relative_to(s.mask, table.root), s.defect)
        for i, s in enumerate(table)
    ]


MVTEC = [
    "bolt/train/good/000.png",
    "bolt/test/good/000.PNG",
    "bolt/test/crack/000.jpg",
    "bolt/test/crack/001.png",
    "bolt/ground_truth/crack/000_mask.png",
    "bolt/ground_truth/crack/001.png",
    "nut/train/good/a.png",
    "nut/test/bent/a.png",
]


def test_mvtec_reads_splits_labels_and_masks_of_mixed_categories(tmp_path):
    touch(tmp_path, *MVTEC)
    assert rows(scan(tmp_path)) == [
        ("bolt/test/crack/000.jpg", "bolt", 1, "test", "bolt/ground_truth/crack/000_mask.png", "crack"),
        ("bolt/test/crack/001.png", "bolt", 1, "test", "bolt/ground_truth/crack/001.png", "crack"),
        ("bolt/test/good/000.PNG", "bolt", 0, "test", "", "good"),
        ("bolt/train/good/000.png", "bolt", 0, "train", "", "good"),
        ("nut/test/bent/a.png", "nut", 1, "test", "", "bent"),
        ("nut/train/good/a.png", "nut", 0, "train", "", "good"),
    ]
    assert scan(tmp_path).masked_categories() == ["bolt"]


def test_a_single_mvtec_category_may_be_the_root(tmp_path):
    touch(tmp_path, *MVTEC)
    assert rows(scan(tmp_path / "nut")) == [
        ("test/bent/a.png", "nut", 1, "test", "", "bent"),
        ("train/good/a.png", "nut", 0, "train", "", "good"),
    ]


@pytest.mark.parametrize("name", ["val", "validation", "Val"])
def test_mvtec_reads_a_validation_split_where_there_is_one(tmp_path, name):
    touch(tmp_path, "bolt/train/ok/a.png", f"bolt/{name}/ok/b.png", "bolt/test/ok/c.png")
    assert [(s.split, s.label, s.defect) for s in scan(tmp_path)] == [
        (split, 0, "good") for split in sorted(["train", "test", "val"], key=lambda s: {"val": name}.get(s, s))
    ]


@pytest.mark.parametrize("name", ["ground_truth", "GT", "mask", "Masks"])
def test_mvtec_finds_masks_in_folders_of_several_names(tmp_path, name):
    touch(tmp_path, "bolt/train/good/a.png", "bolt/test/crack/a.png", f"bolt/{name}/crack/a_mask.png")
    assert rows(scan(tmp_path))[0] == ("bolt/test/crack/a.png", "bolt", 1, "test", f"bolt/{name}/crack/a_mask.png", "crack")


def test_images_in_deeper_folders_find_their_masks(tmp_path):
    touch(tmp_path, "bolt/train/good/a.png", "bolt/test/crack/day1/a.png", "bolt/ground_truth/crack/day1/a_mask.png")
    assert rows(scan(tmp_path))[0] == (
        "bolt/test/crack/day1/a.png", "bolt", 1, "test", "bolt/ground_truth/crack/day1/a_mask.png", "crack",
    )  # fmt: skip


VISA = [
    *(f"candle/Data/Images/Normal/{n:04d}.JPG" for n in range(40)),
    "candle/Data/Images/Anomaly/000.JPG",
    "candle/Data/Images/Anomaly/001.JPG",
    "candle/Data/Masks/Anomaly/000.png",
]


# Written out: these choices may never change between versions, or a test image turns into a training image.
VISA_TESTED = (2, 10, 14, 18, 19, 23, 26, 29, 31, 38, 39)
FOLDER_TESTED = (6, 10, 13, 19, 25, 38)


def test_visa_follows_its_official_split(tmp_path):
    touch(tmp_path, *VISA)
    listed = {path: "test" if "Anomaly" in path or path.endswith(("0.JPG", "5.JPG")) else "train" for path in VISA[:-1]}
    (tmp_path / "split_csv").mkdir()
    lines = ["object,split,label,image,mask", *(f"candle,{split},x,{path}," for path, split in listed.items())]
    (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(lines))
    table = scan(tmp_path)
    assert {table.relative(i): s.split for i, s in enumerate(table)} == listed
    assert rows(table)[:2] == [
        (VISA[-3], "candle", 1, "test", VISA[-1], "anomaly"),
        (VISA[-2], "candle", 1, "test", "", "anomaly"),
    ]


def split_visa(root, *paths, encoding="utf-8"):
    (root / "split_csv").mkdir()
    lines = ["object,split,label,image,mask", *(f"candle,train,normal,{path}," for path in paths)]
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines), encoding=encoding)


def test_visas_split_may_be_written_on_windows(tmp_path):
    touch(tmp_path, *VISA)
    split_visa(tmp_path, *(path.replace("/", "\\") for path in VISA[:40]))
    assert len(scan(tmp_path).where(split="train")) == 40


def test_visas_split_that_names_other_images_is_refused(tmp_path):
    """Or some that are published as test images would be trained on."""
    touch(tmp_path, *VISA)
    split_visa(tmp_path, *(f"VisA/{path}" for path in VISA[:40]))
    with pytest.raises(UadxError) as error:
        scan(tmp_path)
    expected = f"{tmp_path / 'split_csv' / '1cls.csv'}: names none of the images of 'candle' that are there"
    assert error.value.message == expected
    assert "candle/Data/Images/Normal/…" in error.value.hint
    # A product of one's own beside them is none of its business.
    (tmp_path / "split_csv" / "1cls.csv").write_text("object,split,label,image,mask\n")
    assert len(scan(tmp_path).where(split="test", label=0)) == len(VISA_TESTED)


def test_a_split_of_visa_that_cannot_be_read_is_named(tmp_path):
    touch(tmp_path, *VISA)
    split_visa(tmp_path, "candle/Data/Images/Normal/é.JPG", encoding="latin-1")
    with pytest.raises(UadxError, match=r"1cls\.csv: cannot be read: 'utf-8' codec can't decode byte 0xe9") as error:
        scan(tmp_path)
    assert error.value.hint == "save it as UTF-8 text"
    (tmp_path / "split_csv" / "1cls.csv").write_text("object,split,image\ncandle,trian,a.JPG\n")
    with pytest.raises(UadxError, match=r"1cls\.csv:2: no image, or a split other than train and test"):
        scan(tmp_path)


@pytest.mark.parametrize("root", [".", "candle"])
def test_visa_without_a_split_tests_on_a_share_chosen_by_name(tmp_path, root):
    touch(tmp_path, *VISA)
    table = scan(tmp_path / root)
    tested = [Path(s.path).name for s in table if s.split == "test" and s.label == 0]
    assert tested == [f"{n:04d}.JPG" for n in VISA_TESTED]
    assert {s.split for s in table if s.label == 1} == {"test"}


FOLDER = [
    *(f"bolt/good/{n:03d}.png" for n in range(40)),
    "bolt/crack/000.png",
    "bolt/bent/000.png",
    "bolt/masks/crack/000.png",
    "bolt/masks/bent/000_gt.png",
    "nut/OK/a.png",
    "nut/NG/a.png",
    "nut/Mask/a_mask.png",
]


def test_plain_folders_with_masks_by_defect_or_flat(tmp_path):
    touch(tmp_path, *FOLDER)
    table = scan(tmp_path)
    assert [row for row in rows(table) if row[2] == 1] == [
        ("bolt/bent/000.png", "bolt", 1, "test", "bolt/masks/bent/000_gt.png", "bent"),
        ("bolt/crack/000.png", "bolt", 1, "test", "bolt/masks/crack/000.png", "crack"),
        ("nut/NG/a.png", "nut", 1, "test", "nut/Mask/a_mask.png", "NG"),
    ]
    assert [Path(s.path).name for s in table if s.category == "bolt" and s.split == "test" and s.label == 0] == [
        f"{n:03d}.png" for n in FOLDER_TESTED
    ]
    assert {s.defect for s in table if s.label == 0} == {"good"}


def test_a_mask_that_two_images_could_claim_by_its_name_is_that_of_neither(tmp_path):
    touch(tmp_path, "bolt/ok/a.png", "bolt/bent/0.png", "bolt/crack/0.png", "bolt/crack/1.png")
    touch(tmp_path, "bolt/masks/0.png", "bolt/masks/1.png")
    masks = {relative_to(s.path, tmp_path): relative_to(s.mask, tmp_path) for s in scan(tmp_path) if s.label}
    assert masks == {"bolt/bent/0.png": "", "bolt/crack/0.png": "", "bolt/crack/1.png": "bolt/masks/1.png"}


def test_one_plain_folder_category_may_be_the_root_and_is_split_the_same(tmp_path):
    touch(tmp_path, *FOLDER)
    whole, alone = scan(tmp_path, categories=["bolt"]), scan(tmp_path / "bolt")
    assert list(alone) == list(whole)


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (MVTEC, "mvtec"),
        (["bolt/test/crack/a.png"], "mvtec"),
        (VISA, "visa"),
        (FOLDER, "folder"),
        ([*FOLDER, "index.csv"], "index"),
    ],
)
def test_the_layout_is_recognised(tmp_path, files, layout):
    touch(tmp_path, *files)
    assert recognise(tmp_path).name == layout


@pytest.mark.parametrize("files", [[], ["a.png"], ["bolt/a.png"], [".good/a.png"]])
def test_folders_without_a_known_layout_are_refused(tmp_path, files):
    touch(tmp_path, *files)
    with pytest.raises(UadxError) as error:
        scan(tmp_path)
    assert error.value.message == f"{tmp_path}: no known layout of images"
    for name in ("folder: CATEGORY/{good,", "index: a file index.csv", "mvtec: CATEGORY/train", "visa: CATEGORY/Data"):
        assert name in error.value.hint


def test_a_layout_without_any_image_is_refused(tmp_path):
    touch(tmp_path, "bolt/train/good/notes.txt")
    with pytest.raises(UadxError) as error:
        scan(tmp_path)
    assert error.value.message == f"{tmp_path}: no image found for layout 'mvtec'"


@pytest.mark.parametrize("place", ["lost+found", "bolt/lost+found", "bolt/test/scratch", "bolt/test/crack/more"])
def test_a_folder_that_may_not_be_read_is_left_out(tmp_path, closed, place):
    touch(tmp_path, *MVTEC)
    before = rows(scan(tmp_path))
    closed(tmp_path / place)
    assert rows(scan(tmp_path)) == before


def test_plain_folders_that_may_not_be_read_are_left_out(tmp_path, closed):
    touch(tmp_path, "bolt/good/a.png", "bolt/bad/a.png", "bolt/masks/a.png")
    closed(tmp_path / "lost+found")
    closed(tmp_path / "bolt" / "worse")
    closed(tmp_path / "bolt" / "masks")
    assert {row[0] for row in rows(scan(tmp_path))} == {"bolt/good/a.png", "bolt/bad/a.png"}


def test_links_back_into_a_folder_double_nothing(tmp_path, mvtec):
    table = scan(mvtec(tmp_path, "bolt"))
    for place, target in (("train/good/self", "."), ("test/crack/loop", "loop"), ("loop", "loop")):
        (tmp_path / "bolt" / place).symlink_to(target)
    assert list(scan(tmp_path, "mvtec").paths) == list(table.paths)


def test_a_root_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UadxError) as error:
        scan(tmp_path)
    assert (error.value.message, error.value.hint) == (
        f"{tmp_path}: cannot be read: Permission denied",
        "check its permissions",
    )


def test_a_missing_root_is_refused(tmp_path):
    with pytest.raises(UadxError) as error:
        scan(tmp_path / "nowhere")
    assert error.value.message == f"{tmp_path / 'nowhere'}: no such file or folder"


def test_an_unknown_layout_or_category_suggests_the_nearest(tmp_path):
    touch(tmp_path, *MVTEC)
    with pytest.raises(UsageError) as error:
        scan(tmp_path, layout="mvtek")
    assert error.value.message == "unknown layout 'mvtek'"
    assert error.value.hint.startswith("did you mean 'mvtec'? known: ")
    with pytest.raises(UsageError) as error:
        scan(tmp_path, categories=["bolt", "nutt"])
    assert (error.value.message, error.value.hint) == ("unknown category 'nutt'", "did you mean 'nut'? known: bolt, nut")


def test_categories_restrict_what_is_indexed(tmp_path):
    touch(tmp_path, *MVTEC)
    assert scan(tmp_path, categories=["nut"]).categories == ["nut"]


def test_a_relative_root_gives_absolute_paths(tmp_path, monkeypatch):
    touch(tmp_path, *MVTEC)
    monkeypatch.chdir(tmp_path)
    assert list(scan("bolt")) == list(scan(tmp_path / "bolt"))


def test_a_root_with_two_dots_is_the_folder_that_they_lead_to(tmp_path, monkeypatch):
    """Its name decides which images a plain folder keeps for testing."""
    touch(tmp_path, *(f"bolt/good/{number}.png" for number in range(40)), "bolt/bad/0.png")
    table = scan(tmp_path / "bolt")
    monkeypatch.chdir(tmp_path / "bolt" / "good")
    assert list(scan("..")) == list(table)
    assert scan("../../bolt").fingerprint() == table.fingerprint()
    (tmp_path / "screw").symlink_to(tmp_path / "bolt")
    assert scan(tmp_path / "screw").categories == ["screw"]


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    touch(tmp_path, *MVTEC)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert scan("~/nut")[0].path == str(tmp_path / "nut/test/bent/a.png")


def test_unicode_and_blanks_in_names_survive(tmp_path):
    root = tmp_path / "Daten 2 – Prüfung"
    train, test, mask = "Öse 1/train/good/Nr. 1.png", "Öse 1/test/Riß/日本 1.png", "Öse 1/ground_truth/Riß/日本 1_mask.png"
    touch(root, train, test, mask)
    assert rows(scan(root)) == [(test, "Öse 1", 1, "test", mask, "Riß"), (train, "Öse 1", 0, "train", "", "good")]


def test_hidden_files_and_folders_and_other_files_are_ignored(tmp_path):
    touch(tmp_path, *MVTEC)
    expected = rows(scan(tmp_path))
    touch(tmp_path, "bolt/train/good/._000.png", "bolt/train/good/.cache/x.png", ".git/train/good/x.png")
    touch(tmp_path, "bolt/train/good/Thumbs.db", "bolt/test/.crack/x.png", "bolt/ground_truth/crack/._000_mask.png")
    assert rows(scan(tmp_path)) == expected


def test_a_layout_that_was_named_is_taken_again_where_a_product_of_the_training_lies_in_it(tmp_path):
    """As a run says it: named was ``folder``, of whose products there is one in the copy, and none in the other data."""
    origin = {"data": str(tmp_path / "home"), "layout": "folder", "products": ["bolt", "nut"]}
    touch(tmp_path / "copy", "bolt/good/0.png", "bolt/bent/0.png")
    touch(tmp_path / "other", *(path.removeprefix("bolt/") for path in MVTEC if path.startswith("bolt")))
    assert usual_layout(tmp_path / "home", origin) == "folder"
    assert usual_layout(tmp_path / "copy", origin) == "folder"
    assert usual_layout(tmp_path / "copy", {**origin, "layout": "visa"}) is None
    assert usual_layout(tmp_path / "other", origin) is None
    assert scan(tmp_path / "other", "folder").categories == ["test", "train"], "it might be that layout"
    for nothing in ({}, {"layout": None}, {**origin, "layout": "gone"}, {**origin, "products": []}):
        assert usual_layout(tmp_path / "copy", nothing) is None
    assert usual_layout(tmp_path / "nowhere", origin) is None


def test_samples_are_absolute_and_complete(tmp_path):
    touch(tmp_path, *MVTEC)
    assert scan(tmp_path)[0] == Sample(
        path=str(tmp_path / "bolt/test/crack/000.jpg"),
        category="bolt",
        label=1,
        split="test",
        mask=str(tmp_path / "bolt/ground_truth/crack/000_mask.png"),
        defect="crack",
    )
