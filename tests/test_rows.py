"""Names of pictures, and rows."""

import os

import pytest

from uad_plugins.evaluation.rows import picture_names


def places(names, out):
    return {os.path.realpath(out / name) for name in names.values()}


def test_a_picture_has_the_name_of_its_image(tmp_path):
    paths = [str(tmp_path / name) for name in ("x/a.png", "x/a.jpg", "y/b.png")]
    assert list(picture_names(paths, ".png", tmp_path / "out").values()) == ["x/a_map.png", "x/a_jpg_map.png", "y/b_map.png"]
    assert picture_names([], ".png", tmp_path) == {}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("images", "out"),
    [
        (["a.png", "a_map.png"], "."),
        (["a.png", "a_map.png", "a_png_map.png"], "."),
        (["a.png", "deep/a_map.png"], "deep"),
        (["a.png", "a_map.png"], "link"),
        (["a.png", "link/a_map.png"], "."),
        (["a.png", "A_MAP.png"], "."),
    ],
)
def test_no_picture_takes_the_place_of_an_image(tmp_path, images, out, order):
    (tmp_path / "link").symlink_to(tmp_path)
    paths = [str(tmp_path / image) for image in images][::order]
    names = picture_names(paths, ".png", tmp_path / out)
    assert len(names) == len(places(names, tmp_path / out)) == len(images)
    assert not {p.lower() for p in places(names, tmp_path / out)} & {os.path.realpath(path).lower() for path in paths}
