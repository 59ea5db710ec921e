"""Checking data: every kind of problem is found, named, and weighed."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from uad_plugins.data.check import ERROR, WARNING, CategoryReport, Problem, check_data, require_readable, unreadable
from uad_plugins.data.layouts import left_out, scan
from uad_plugins.errors import UadxError


@pytest.fixture
def bolt(tmp_path, mvtec):
    """A category with nothing wrong: 20 training images, 2 good and 2 defective test images with masks."""
    return mvtec(tmp_path, "bolt", train=20)


def problems(root, **options):
    return check_data(scan(root, **options)).problems


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def test_a_sound_data_set_has_no_problem(bolt):
    report = check_data(scan(bolt))
    assert report.problems == []
    assert report.trainable is True
    assert report.categories == {"bolt": CategoryReport(20, 0, 2, 2, 2, {"20x16": 24}, {"PNG": 24})}


def test_the_synthetic_products_lack_nothing_but_images(products):
    report = check_data(scan(products))
    assert report.problems == [
        Problem(WARNING, "few-training-images", "", f"category '{name}' has 10 training images")
        for name in ("connector", "fabric", "washer")
    ]
    assert set(map(str, report.categories.values())) == {str(CategoryReport(10, 0, 4, 4, 4, {"64x64": 18}, {"PNG": 18}))}


def test_sizes_and_formats_are_counted_as_displayed(bolt, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(bolt / "bolt" / "train" / "good" / "turned.jpg", size=(30, 10))
    Image.open(path).save(path, exif=exif)
    counted = check_data(scan(bolt)).categories["bolt"]
    assert counted.sizes == {"20x16": 24, "10x30": 1}
    assert counted.formats == {"PNG": 24, "JPEG": 1}


def test_an_unreadable_training_image_is_an_error(bolt):
    truncate(bolt / "bolt/train/good/003.png")
    report = check_data(scan(bolt))
    assert report.problems == [
        Problem(ERROR, "unreadable", "bolt/train/good/003.png", "cannot be decoded: image file is truncated")
    ]
    assert report.trainable is False
    assert report.categories["bolt"].sizes == {"20x16": 23}


def test_an_unreadable_test_image_is_a_warning(bolt):
    (bolt / "bolt/test/good/000.png").write_bytes(b"")
    report = check_data(scan(bolt))
    assert report.problems == [Problem(WARNING, "unreadable", "bolt/test/good/000.png", "empty file")]
    assert report.trainable is True


def test_an_anomalous_training_image_is_an_error(bolt, picture):
    picture(bolt / "bolt/train/bent/000.png")
    report = check_data(scan(bolt))
    assert [p for p in report.problems if p.severity == ERROR] == [
        Problem(ERROR, "anomalous-in-training", "bolt/train/bent/000.png", "anomalous image in the training split")
    ]
    assert report.trainable is False


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda path, mask: path.write_text("no mask"), "mask-unreadable", "not an image of a known format"),
        (lambda path, mask: mask(path, size=(16, 20)), "mask-size", "mask is 16x20, its image 20x16"),
        (lambda path, mask: mask(path, marked=False), "mask-empty", "mask of an anomalous image marks no pixel"),
    ],
)
def test_a_bad_mask_is_a_warning(bolt, mask, damage, kind, message):
    damage(bolt / "bolt/ground_truth/crack/001_mask.png", mask)
    assert problems(bolt) == [Problem(WARNING, kind, "bolt/ground_truth/crack/001_mask.png", message)]


def test_an_empty_mask_of_a_normal_image_is_no_problem(tmp_path, picture, mask):
    for number in range(21):
        picture(tmp_path / f"{number}.png")
    mask(tmp_path / "truth.png", marked=False)
    lines = [
        "path,category,split,label,mask",
        *(f"{n}.png,bolt,train,0," for n in range(20)),
        "20.png,bolt,test,0,truth.png",
    ]
    (tmp_path / "index.csv").write_text("\n".join(lines))
    assert problems(tmp_path) == []


def test_a_missing_mask_is_a_warning_where_others_have_one(bolt, mvtec):
    mvtec(bolt, "nut", train=20, masks=False)
    (bolt / "bolt/ground_truth/crack/001_mask.png").unlink()
    assert problems(bolt) == [
        Problem(
            WARNING,
            "mask-missing",
            "bolt/test/crack/001.png",
            "anomalous image without a mask in a category with masks",
        )
    ]


def test_a_mask_without_an_image_is_a_warning(bolt, mask):
    mask(bolt / "bolt/ground_truth/crack/009_mask.png")
    assert problems(bolt) == [
        Problem(
            WARNING,
            "mask-without-image",
            "bolt/ground_truth/crack/009_mask.png",
            "mask belongs to no image, or by its name to two",
        )
    ]


def test_a_mask_without_an_image_is_found_in_a_linked_category(tmp_path, mvtec, mask):
    mvtec(tmp_path / "elsewhere", "bolt", train=20)
    mask(tmp_path / "elsewhere/bolt/ground_truth/crack/009_mask.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bolt").symlink_to(tmp_path / "elsewhere" / "bolt")
    (problem,) = problems(tmp_path / "data")
    assert (problem.kind, problem.path) == ("mask-without-image", "bolt/ground_truth/crack/009_mask.png")


def test_masks_of_good_parts_are_no_problem(bolt, mask):
    mask(bolt / "bolt/ground_truth/good/000_mask.png", marked=False)
    assert problems(bolt) == []


def test_a_mask_that_two_images_could_claim_is_named(tmp_path, picture, mask):
    for name in (*(f"good/{number}" for number in range(30)), "bent/0", "crack/0"):
        picture(tmp_path / "bolt" / f"{name}.png")
    mask(tmp_path / "bolt" / "masks" / "0.png")
    message = "mask belongs to no image, or by its name to two"
    assert problems(tmp_path) == [Problem(WARNING, "mask-without-image", "bolt/masks/0.png", message)]


def test_a_folder_that_cannot_be_read_is_a_warning(bolt, closed):
    closed(bolt / "bolt" / "lost+found")
    closed(bolt / "bolt" / "ground_truth" / "crack")
    message = "cannot be read: Permission denied; what is in it is left out"
    found = [problem for problem in problems(bolt) if problem.kind == "folder-unreadable"]
    assert sorted(found, key=lambda problem: problem.path) == [
        Problem(WARNING, "folder-unreadable", "bolt/ground_truth/crack", message),
        Problem(WARNING, "folder-unreadable", "bolt/lost+found", message),
    ]


def test_masks_of_categories_left_out_are_no_problem(bolt, mvtec, mask):
    mvtec(bolt, "nut", train=20)
    mask(bolt / "nut/ground_truth/crack/009_mask.png")
    assert problems(bolt, categories=["bolt"]) == []


def test_folders_of_images_in_no_category_are_named(bolt, picture, tmp_path, uadx):
    for name in ("nut/good/1.png", "nut/bad/2.png", "ring/3.png", "trian/trian/good/4.png", "bolt/train/5.png", "6.png"):
        picture(bolt / name)
    picture(tmp_path / "elsewhere" / "good" / "7.png")
    (bolt / "linked").symlink_to(bolt / "bolt")
    (bolt / "bolt" / "test" / "elsewhere").symlink_to(bolt / "elsewhere")
    assert left_out(bolt, scan(bolt)) == {".": 1, "bolt/train": 1, "nut": 2, "ring": 1, "trian": 1}
    status, out, _ = uadx("data", "check", bolt)
    assert status == 0
    assert "warning: nut: images here that belong to no category: 2\n" in out


def test_beside_an_index_there_may_be_other_images(bolt, picture, mask, uadx):
    mask(bolt / "bolt/ground_truth/crack/009_mask.png")
    picture(bolt / "nut" / "good" / "1.png")
    (bolt / "index.csv").write_text("path,category,split,label\nbolt/train/good/000.png,bolt,train,good\n")
    assert left_out(bolt, scan(bolt)) == left_out(bolt, scan(bolt, "mvtec"), "index") == {}
    assert left_out(bolt, scan(bolt, "mvtec"), "mvtec") == {"nut": 1}
    status, out, err = uadx("data", "check", bolt)
    assert status == 1
    assert "mask" not in out.partition("error:")[2]
    # Another way out is offered where it is one.
    assert err.splitlines()[-1] == "training would fail: repair the errors above"
    truncate(bolt / "bolt/train/good/003.png")
    _, _, err = uadx("data", "check", bolt, "--layout", "mvtec")
    assert err.splitlines()[-1].endswith(", or leave unreadable files out with 'uadx train --skip-bad'")


def test_a_product_called_mask_has_no_orphan_masks(tmp_path, mvtec):
    assert problems(mvtec(tmp_path, "mask", train=20)) == []


def test_the_same_picture_in_two_splits_is_found_in_another_encoding(bolt):
    with Image.open(bolt / "bolt/train/good/004.png") as image:
        image.save(bolt / "bolt/test/good/copy.bmp")
    assert problems(bolt) == [
        Problem(
            WARNING,
            "duplicate-across-splits",
            "bolt/train/good/004.png",
            "same picture as bolt/test/good/copy.bmp (test and train)",
        )
    ]


def test_the_same_picture_twice_in_one_split_is_a_duplicate(bolt):
    with Image.open(bolt / "bolt/train/good/004.png") as image:
        image.save(bolt / "bolt/train/good/zcopy.png", compress_level=0)
    assert problems(bolt) == [
        Problem(WARNING, "duplicate", "bolt/train/good/zcopy.png", "same picture as bolt/train/good/004.png")
    ]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (0, (WARNING, "no-training-images", "category 'nut' has no normal training images")),
        (1, (ERROR, "one-training-image", "category 'nut' has one training image: none to hold out")),
        (2, (WARNING, "few-training-images", "category 'nut' has 2 training images")),
        (19, (WARNING, "few-training-images", "category 'nut' has 19 training images")),
        (20, None),
    ],
)
def test_categories_with_few_training_images_are_named(bolt, mvtec, train, expected):
    mvtec(bolt, "nut", train=train)
    assert [(p.severity, p.kind, p.message) for p in problems(bolt)] == ([expected] if expected else [])


def test_no_training_images_at_all_is_an_error(tmp_path, mvtec):
    report = check_data(scan(mvtec(tmp_path, "bolt", train=0)))
    assert report.problems == [Problem(ERROR, "no-training-images", "", "no category has normal training images")]
    assert report.trainable is False


def test_errors_come_first_and_the_report_is_plain_data(bolt):
    truncate(bolt / "bolt/train/good/000.png")
    truncate(bolt / "bolt/test/good/000.png")
    report = json.loads(json.dumps(check_data(scan(bolt)).as_dict()))
    reason = "cannot be decoded: image file is truncated"
    assert report["trainable"] is False
    assert report["problems"] == [
        {"severity": "error", "kind": "unreadable", "path": "bolt/train/good/000.png", "message": reason},
        {"severity": "warning", "kind": "unreadable", "path": "bolt/test/good/000.png", "message": reason},
    ]
    assert report["categories"]["bolt"]["test_anomalous"] == 2


def test_progress_counts_every_image_once_in_order(bolt):
    calls = []
    check_data(scan(bolt), lambda done, total: calls.append((done, total)))
    assert calls == [(done, 24) for done in range(1, 25)]


def test_more_images_than_are_decoded_at_a_time_keep_their_reasons(tmp_path, picture):
    paths = [str(picture(tmp_path / f"{number}.png", size=(4, 4))) for number in range(100)]
    for number in (3, 70, 99):
        (tmp_path / f"{number}.png").write_bytes(b"")
    calls = []
    found = unreadable(paths, lambda done, total: calls.append((done, total)))
    assert found == {paths[number]: "empty file" for number in (3, 70, 99)}
    assert calls == [(done, 100) for done in range(1, 101)]


def test_findings_stay_with_their_images_beyond_those_decoded_at_a_time(tmp_path, mvtec):
    mvtec(tmp_path, "bolt", train=100)
    bad = [f"bolt/train/good/{number:03d}.png" for number in (5, 66, 99)]
    for name in bad:
        truncate(tmp_path / name)
    assert [(p.kind, p.path) for p in problems(tmp_path)] == [("unreadable", name) for name in bad]


@pytest.mark.parametrize(("bad", "more"), [(["000"], ""), (["000", "002", "003"], " (and 2 more)")])
def test_an_unreadable_image_stops_and_is_named(bolt, bad, more):
    for name in bad:
        truncate(bolt / f"bolt/train/good/{name}.png")
    with pytest.raises(UadxError) as error:
        require_readable(scan(bolt), ("train",), skip_bad=False)
    first = bolt / "bolt/train/good/000.png"
    assert error.value.message == f"{first}: cannot be decoded: image file is truncated{more}"
    assert "--skip-bad" in error.value.hint


def test_unreadable_images_are_left_out_and_recorded_on_demand(bolt):
    bad = bolt / "bolt/train/good/002.png"
    truncate(bad)
    table = scan(bolt)
    left, skipped = require_readable(table, ("train",), skip_bad=True)
    assert skipped == {str(bad): "cannot be decoded: image file is truncated"}
    assert list(left) == [sample for sample in table if sample.path != str(bad)]


def test_only_the_splits_asked_for_are_decoded(bolt):
    truncate(bolt / "bolt/test/good/000.png")
    table = scan(bolt)
    calls = []
    left, skipped = require_readable(table, ("train", "val"), skip_bad=False, progress=lambda *call: calls.append(call))
    assert left is table
    assert skipped == {}
    assert calls[-1] == (20, 20)
