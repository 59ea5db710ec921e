"""Reading images and masks: whatever the file holds, 8-bit RGB upright, or an error that names it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from uad_plugins.deployment.jetson.uadx_jetson import imaging as on_device
from uad_plugins.imaging import (
    ImageError,
    is_image,
    open_image,
    read_mask,
    read_rgb,
    resize_mask,
    resize_rgb,
    to_8_bit,
)

ORIENTATION = 0x0112
READERS = [read_rgb, read_mask]


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8)


def smooth():
    y, x = np.mgrid[0:24, 0:40]
    return np.stack([x * 6, y * 10, x + y], axis=-1).astype(np.uint8)


def message_of(error):
    return error.value.message


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.PNG", {}),
        ("a.bmp", {}),
        ("a.BMP", {}),
        ("a.tif", {}),
        ("a.TIFF", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True}),
        ("a.WebP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_back_every_pixel(tmp_path, noise, name, options):
    Image.fromarray(noise).save(tmp_path / name, **options)
    image = read_rgb(tmp_path / name)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), noise)


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.jpg", {}), ("a.JPEG", {"progressive": True}), ("a.jpg", {"format": "MPO", "save_all": True, "append_images": []})],
)
def test_jpeg_gives_back_the_picture(tmp_path, name, options):
    Image.fromarray(smooth()).save(tmp_path / name, quality=95, subsampling=0, **options)
    np.testing.assert_allclose(np.asarray(read_rgb(tmp_path / name)).astype(int), smooth(), atol=6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", True),
        ("a.b.JPeG", True),
        ("ü ñ.Tif", True),
        (".hidden.png", False),
        (".png", False),
        ("a.gif", False),
        ("a.png.txt", False),
        ("png", False),
    ],
)
def test_a_file_name_tells_an_image(name, expected):
    assert is_image(name) is expected


def of_mode(mode):
    """An image of a mode and the RGB values that it shows."""
    grey = np.arange(0, 252, dtype=np.uint8).reshape(12, 21)
    triple = np.repeat(grey[..., None], 3, axis=2)
    coloured = np.stack([grey, 255 - grey, grey // 2], axis=-1)
    if mode == "L":
        return Image.fromarray(grey), triple
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]), triple
    if mode == "RGBA":
        return Image.fromarray(np.dstack([coloured, grey])), coloured
    if mode == "1":
        return Image.fromarray(grey).convert("1", dither=Image.Dither.NONE), np.where(triple > 127, 255, 0)
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257 + 100), triple
    if mode == "CMYK":
        ink = np.zeros((12, 21, 4), dtype=np.uint8)
        ink[:, :, 1:3] = 255
        return Image.fromarray(ink, mode="CMYK"), np.broadcast_to([255, 0, 0], (12, 21, 3))
    palette = Image.fromarray(grey % 4, mode="P")
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)
    palette.putpalette(colours.tobytes())
    if mode == "P, transparent":
        palette.info["transparency"] = bytes([0, 128, 255, 255])
    return palette, colours[grey % 4]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "a.png"),
        ("LA", "a.png"),
        ("RGBA", "a.png"),
        ("RGBA", "a.tif"),
        ("1", "a.png"),
        ("1", "a.bmp"),
        ("P", "a.png"),
        ("P", "a.bmp"),
        ("P, transparent", "a.png"),
        ("I;16", "a.png"),
        ("I;16", "a.tif"),
        ("CMYK", "a.tif"),
    ],
)
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    image, expected = of_mode(mode)
    image.save(tmp_path / name)
    read = read_rgb(tmp_path / name)
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), expected)


def test_sixteen_bits_are_scaled_from_their_full_range(tmp_path):
    Image.fromarray(np.array([[0, 256, 257, 32896, 65278, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_rgb(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255]


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, noise, name, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if name == "a.webp" else {}
    Image.fromarray(noise).save(tmp_path / name, exif=exif, **options)
    upright = UPRIGHT[orientation](noise)
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / name)), upright)


def test_masks_are_turned_like_their_images(tmp_path):
    pixels = np.zeros((4, 6), dtype=np.uint8)
    pixels[0, 5] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), np.rot90(pixels > 0, -1))


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_image_is_refused_with_its_name(tmp_path, read):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture\n" * 20)
    Image.new("L", (4, 4)).save(tmp_path / "gif.png", format="GIF")
    (tmp_path / "folder.png").mkdir()
    reasons = {}
    for name in ("empty.png", "text.png", "gif.png", "folder.png", "missing.png"):
        with pytest.raises(ImageError) as error:
            read(tmp_path / name)
        reasons[name] = message_of(error)
    assert reasons == {
        "empty.png": f"{tmp_path / 'empty.png'}: empty file",
        "text.png": f"{tmp_path / 'text.png'}: not an image of a known format",
        "gif.png": f"{tmp_path / 'gif.png'}: not an image of a known format",
        "folder.png": f"{tmp_path / 'folder.png'}: is a folder, not an image",
        "missing.png": f"{tmp_path / 'missing.png'}: no such file",
    }


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp"])
@pytest.mark.parametrize("read", READERS)
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
def test_a_truncated_file_is_refused_with_its_name(tmp_path, noise, name, read):
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ImageError, match=r"cannot be decoded|not an image of a known format") as error:
        read(path)
    assert message_of(error).startswith(f"{path}: ")


@pytest.mark.parametrize("read", READERS)
def test_damaged_exif_is_refused_like_a_damaged_image(tmp_path, noise, read):
    turned = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    resolution_in_letters = struct.pack(">HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + turned + resolution_in_letters + struct.pack(">I", 0)
    Image.fromarray(noise).save(tmp_path / "a.webp", exif=exif)
    with pytest.raises(ImageError) as error:
        read(tmp_path / "a.webp")
    assert message_of(error) == f"{tmp_path / 'a.webp'}: cannot be decoded: bad operand type for abs(): 'str'"


def claim(path, side):
    """A PNG file of a few bytes whose header claims a square of the given side."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    return path


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (12_000, "12000x12000 pixels are more than the 134 million allowed"),
        (60_000, "claims more than the 134 million pixels allowed"),
    ],
)
@pytest.mark.parametrize("read", [open_image, *READERS])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side, reason, read):
    path = claim(tmp_path / "bomb.png", side)
    with pytest.raises(ImageError) as error:
        read(path)
    assert message_of(error) == f"{path}: {reason}"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_allowed_image_is_opened(tmp_path):
    with open_image(claim(tmp_path / "large.png", 11_585)) as image:
        assert image.size == (11_585, 11_585)


def test_floating_point_pixels_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(path)
    with pytest.raises(ImageError) as error:
        read_rgb(path)
    assert message_of(error) == (f"{path}: 32-bit floating-point pixels have no known range; save it with 8 or 16 bits")


def mask_of_mode(mode, truth):
    values = truth.astype(np.uint8)
    full = np.full_like(values, 255)
    images = {
        "L": lambda: Image.fromarray(values),
        "1": lambda: Image.fromarray(truth),
        "RGB": lambda: Image.fromarray(np.dstack([values * 0, values * 0, values * 9])),
        "RGBA": lambda: Image.fromarray(np.dstack([values, values, values, full])),
        "LA": lambda: Image.merge("LA", [Image.fromarray(values), Image.fromarray(full)]),
        "I;16": lambda: Image.fromarray(truth.astype(np.uint16) * 256),
        "P": lambda: Image.fromarray(values).convert("P"),
    }
    if mode != "P, transparent":
        return images[mode]()
    image = images["P"]()
    image.info["transparency"] = bytes([0] * 128 + [255] * 128)
    return image


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "I;16", "P", "P, transparent"])
def test_a_mask_marks_what_is_above_zero_in_any_mode(tmp_path, mode):
    truth = np.random.default_rng(1).random((9, 13)) < 0.3
    mask_of_mode(mode, truth).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, truth)


def test_resizing_takes_height_first_and_averages(noise):
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (32, 16))).convert("RGB")
    small = resize_rgb(stripes, (4, 8))
    assert (small.shape, small.dtype) == ((4, 8, 3), np.uint8)
    np.testing.assert_allclose(small[:, 1:-1].astype(int), 127, atol=12)


def test_resizing_to_the_same_size_changes_nothing(noise):
    np.testing.assert_array_equal(resize_rgb(Image.fromarray(noise), (12, 20)), noise)


@pytest.mark.parametrize("shape", [(12, 20), (300, 420), (7, 500), (64, 64), (1, 1)])
@pytest.mark.parametrize("size", [(64, 64), (30, 50), (5, 3), (512, 256)])
def test_a_grey_image_gives_the_same_pixels_resized_before_it_becomes_rgb(tmp_path, shape, size):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
    grey.save(tmp_path / "grey.png")
    wanted = resize_rgb(grey.convert("RGB"), size)
    for source in (tmp_path / "grey.png", grey, np.asarray(grey)):
        image = to_8_bit(source)
        assert image.mode == "L"
        np.testing.assert_array_equal(resize_rgb(image, size), wanted)
    np.testing.assert_array_equal(resize_rgb(read_rgb(tmp_path / "grey.png"), size), wanted)


@pytest.mark.parametrize("reader", [read_rgb, on_device.read_rgb])
def test_a_file_that_goes_away_while_it_is_looked_at_is_an_error_of_its_own(tmp_path, monkeypatch, reader):
    path = tmp_path / "gone.png"
    path.write_text("no image")
    opened = Image.open

    def vanishing(*arguments, **options):
        try:
            return opened(*arguments, **options)
        finally:
            path.unlink()

    monkeypatch.setattr(Image, "open", vanishing)
    with pytest.raises((ImageError, on_device.ImageError)) as caught:
        reader(str(path))
    assert str(caught.value).removeprefix(f"{path}: ") == "is not there any more"


def test_a_mask_is_resized_without_new_values():
    mask = np.array([[True, False, False], [False, False, True]])
    np.testing.assert_array_equal(resize_mask(mask, (4, 6)), np.kron(mask, np.ones((2, 2), dtype=bool)))
    assert resize_mask(mask, (2, 3)) is mask
