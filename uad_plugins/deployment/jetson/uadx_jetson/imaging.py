"""Images as the network was trained on them: upright 8-bit RGB, bilinear with antialiasing, normalised.

The rules are those of ``uad_plugins/imaging.py``, and a test of uadx holds both to the same pixels.
"""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .bundle import Bundle
from .files import RunnerError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP")
MAX_PIXELS = 1 << 27

MARK = "uadx"
"""Key of the text in a heat map's file that tells it from an image of a part."""

# The limit above is the runner's own; Pillow's warning at two thirds of it would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What Pillow's decoders and its EXIF reader are seen to raise on damaged files.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, MemoryError, struct.error)


class ImageError(RunnerError):
    """An image that cannot be used; the message says why, without the file's name."""


def read_rgb(path: str) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright; 16 bits are scaled from 0..65535, an alpha channel is dropped.

    Raises:
        ImageError: The file is missing, damaged, of another format, too large, or has floating-point pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                limit = MAX_PIXELS // 10**6
                raise ImageError(f"{image.width}x{image.height} pixels are more than the {limit} million allowed")
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except (Image.DecompressionBombError, *_DAMAGE) as error:
        raise ImageError(_reason(path, error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("32-bit floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    image.load()
    return image.convert("RGB")


def _reason(path: str, error: Exception) -> str:
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
    return "cannot be decoded: " + (str(error).splitlines()[0] if str(error) else type(error).__name__)


def resize_rgb(image: Image.Image, height: int, width: int) -> Any:
    """Resize an RGB image; returns uint8 ``(height, width, 3)``."""
    if image.size != (width, height):
        # Of the names of this filter the only one that every Pillow since 8 has.
        image = image.resize((width, height), Image.BILINEAR)  # type: ignore[attr-defined]
    return np.asarray(image)


class Normaliser:
    """Turns resized pixels into the network's input: ``(pixel / 255 - mean) / std``, channels first."""

    def __init__(self, bundle: Bundle) -> None:
        mean, std = np.asarray(bundle.mean, np.float64), np.asarray(bundle.std, np.float64)
        self._scale = (1 / (255 * std)).astype(np.float32).reshape(3, 1, 1)
        self._offset = (-mean / std).astype(np.float32).reshape(3, 1, 1)

    def fill(self, pixels: Any, target: Any) -> None:
        """Write uint8 ``(H, W, 3)`` into float32 ``(1, 3, H, W)``, without memory in between."""
        np.multiply(pixels.transpose(2, 0, 1), self._scale, out=target[0])
        np.add(target[0], self._offset, out=target[0])


def find_images(words: Iterable[str]) -> list[str]:
    """Turn files and folders into image paths, each once, in the order given; folders at any depth, sorted.

    What does not exist or may not be read stays in the list: it gets an error in its row. Heat maps of earlier calls are
    left out of folders; a file that was named itself is taken whatever it is.
    """
    found: dict[str, None] = {}
    for word in words:
        # An empty word, as of a variable that is not set, is not the folder where one is.
        path = str(Path(word).expanduser()) if word else word
        found.update(dict.fromkeys(_below(path) if os.path.isdir(path) else [path]))  # noqa: PTH112
    return list(found)


def _below(folder: str) -> list[str]:
    try:
        return [path for path in sorted(_walked(folder)) if not is_overlay(path)]
    except PermissionError:
        return [folder]


def is_overlay(path: str) -> bool:
    """Tell whether a file is a heat map with the mark; the pixels are not decoded."""
    if not path.lower().endswith(".png"):
        return False
    try:
        with Image.open(path, formats=FORMATS) as image:
            return MARK in image.info
    except (Image.DecompressionBombError, *_DAMAGE):
        return False


def _walked(root: str) -> Iterator[str]:
    """Yield the images below a folder; each folder once, whatever links lead to it, and none that may not be read."""
    own = [(root, os.path.realpath(root))]
    linked: list[tuple[str, str]] = []
    visited: set[str] = set()
    while own or linked:
        place, real = own.pop() if own else linked.pop()
        if real in visited:
            continue
        visited.add(real)
        try:
            listed = os.scandir(place)
        except PermissionError:
            if place == root:
                raise
            continue
        with listed:
            for entry in listed:
                if entry.name.startswith("."):
                    continue
                if not _is_folder(entry):
                    if entry.name.lower().endswith(EXTENSIONS):
                        yield entry.path
                elif entry.is_symlink():
                    linked.append((entry.path, os.path.realpath(entry.path)))
                else:
                    own.append((entry.path, os.path.join(real, entry.name)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads to itself.
        return False
