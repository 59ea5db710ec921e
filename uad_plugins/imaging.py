"""Reading and writing images, the same way at every station, without torch.

Whatever a file holds (grey, palette, RGBA, CMYK, 16 bit, rotated by EXIF), the rest of the program sees 8-bit RGB.
"""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from uad_plugins.errors import UadxError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
"""File name endings, in lower case, that count as images."""

MAX_PIXELS = 1 << 27
"""Images of more pixels (134 million) are refused before they are decoded: a small file can claim gigabytes."""

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP")
"""Pillow decoders that may be used: no others are tried, whatever a file claims to be. JPEG opens MPO files too."""

# The limit above is ours; Pillow's own warning at two thirds of it would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

RgbImage = NDArray[np.uint8]

# What Pillow's decoders and its EXIF reader are seen to raise on damaged files.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, MemoryError, struct.error)


class ImageError(UadxError):
    """An image file that cannot be used; the message names it and says why."""


def is_image(name: str) -> bool:
    """Tell from a file name whether it is an image: known ending in any letter case, not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file and check its header and size; the pixels are not decoded yet.

    Raises:
        ImageError: The file is missing, empty, not an image of a known format, or claims too many pixels.
    """
    try:
        image = Image.open(os.fspath(path), formats=FORMATS)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (Image.DecompressionBombError, *_DAMAGE) as error:
        raise ImageError(f"{path}: {_reason(path, error)}") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        image.close()
        raise ImageError(f"{path}: {size} pixels are more than the {MAX_PIXELS // 10**6} million allowed")
    return image


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    16-bit images are scaled from their full range (0..65535 to 0..255); an alpha channel is dropped.

    Raises:
        ImageError: The file cannot be opened (see ``open_image``), is truncated, or has 32-bit floating-point pixels.
    """
    return _read(path).convert("RGB")


def _read(path: str | os.PathLike[str]) -> Image.Image:
    with open_image(path) as image:
        try:
            ImageOps.exif_transpose(image, in_place=True)
            return _to_8_bit(image, path)
        except _DAMAGE as error:
            raise ImageError(f"{path}: {_reason(path, error)}") from error


def to_8_bit(source: str | os.PathLike[str] | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """Return an image as 8-bit RGB or grey, upright: what ``read_rgb`` makes of a file, from whatever holds the image.

    Grey stays grey: ``resize_rgb`` makes the same pixels of it, and has a third to do.

    Args:
        source: Image file, Pillow image of any mode, or uint8 array ``(H, W, 3)`` in RGB order or ``(H, W)`` in grey.

    Raises:
        ImageError: It is something else, has no pixels or too many, or cannot be decoded.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read(source)
    if isinstance(source, Image.Image):
        try:
            return _to_8_bit(ImageOps.exif_transpose(source), "image")
        except _DAMAGE as error:
            raise ImageError(f"image: cannot be decoded: {error}") from error
    if not isinstance(source, np.ndarray) or source.dtype != np.uint8 or not _is_picture(source.shape):
        found = f"{source.dtype} array {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise ImageError(f"image: {found} is neither a path, a Pillow image nor a uint8 array (H, W, 3) or (H, W)")
    return Image.fromarray(np.ascontiguousarray(source))


def _is_picture(shape: tuple[int, ...]) -> bool:
    known = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
    return known and 0 < shape[0] * shape[1] <= MAX_PIXELS


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.bool_]:
    """Decode a ground-truth mask: bool array ``(H, W)``, True where any channel is above 0 (JPEG: above half).

    Raises:
        ImageError: The file cannot be decoded.
    """
    with open_image(path) as image:
        lossy = image.format in {"JPEG", "MPO"}
        try:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in {"P", "PA"}:
                image = image.convert("RGBA")
            if image.mode in {"LA", "RGBA", "La", "RGBa"}:
                image = image.convert("L" if image.mode.startswith("L") else "RGB")
            pixels = np.asarray(image)
        except _DAMAGE as error:
            raise ImageError(f"{path}: {_reason(path, error)}") from error
    # Lossy compression rings around the edges of a mask.
    positive = np.asarray(pixels > (127 if lossy else 0))
    return np.asarray(positive.any(axis=2)) if positive.ndim == 3 else positive


def misfit(mask: NDArray[np.bool_], size: tuple[int, int]) -> str:
    """Say in words that a mask ``(H, W)`` is not of the ``(height, width)`` of its image, upright; empty: it is."""
    (height, width), (rows, columns) = size, mask.shape
    return "" if (rows, columns) == (height, width) else f"mask is {columns}x{rows}, its image {width}x{height}"


def resize_rgb(image: Image.Image, size: tuple[int, int]) -> RgbImage:
    """Resize to the network's input: bilinear with antialiasing, aspect ratio not kept.

    Args:
        image: RGB or 8-bit grey image.
        size: Target ``(height, width)`` in pixels.

    Returns:
        uint8 array ``(height, width, 3)``.
    """
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def resize_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a mask to ``(height, width)``, nearest neighbour."""
    height, width = size
    if mask.shape == (height, width):
        return mask
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST)) > 0


def _to_8_bit(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    mode = image.mode
    if mode == "F":
        raise ImageError(f"{path}: 32-bit floating-point pixels have no known range; save it with 8 or 16 bits")
    if mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) // 257).astype(np.uint8))
    if mode in {"P", "PA"} and "transparency" in image.info:
        image = image.convert("RGBA")
    image.load()
    return image if image.mode in {"RGB", "L"} else image.convert("RGB")


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"claims more than the {MAX_PIXELS // 10**6} million pixels allowed"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not an image"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, UnidentifiedImageError):
        try:
            return "empty file" if Path(path).stat().st_size == 0 else "not an image of a known format"
        except OSError:
            return "is not there any more"
    return f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
