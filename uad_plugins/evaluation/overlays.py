"""Heat maps over images, at the size of the source image. No torch in here."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from uad_plugins.artifacts import atomic_path
from uad_plugins.imaging import ImageError, open_image

MARK = "uadx"
"""Key of the text in a heat map's file that tells it from an image of a part."""

STRIP = 1 << 16
"""Pixels that are blended at once."""

# Anchors of a perceptually ordered scale: transparent blue over yellow to red.
_ANCHORS = np.array(
    [
        [0.00, 48, 18, 59],
        [0.25, 50, 100, 220],
        [0.45, 40, 190, 200],
        [0.60, 160, 230, 60],
        [0.75, 250, 190, 40],
        [0.90, 235, 80, 20],
        [1.00, 150, 10, 10],
    ],
    dtype=np.float32,
)


def colours(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map values in 0..1, any shape, to RGB colours ``(..., 3)``."""
    clipped = np.clip(values, 0, 1)
    channels = [np.interp(clipped, _ANCHORS[:, 0], _ANCHORS[:, channel]) for channel in (1, 2, 3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def relative_to_threshold(anomaly_map: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    """Scale a map so that the decision threshold lies at 0.5; the result is clipped to 0..1.

    Without a positive threshold the map's own range is shown.
    """
    if threshold > 0 and np.isfinite(threshold):
        return np.clip(anomaly_map / (2 * threshold), 0, 1).astype(np.float32)
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    return ((anomaly_map - low) / max(high - low, 1e-12)).astype(np.float32)


def overlay(image: Image.Image, anomaly_map: NDArray[np.float32], threshold: float) -> Image.Image:
    """Lay an anomaly map over an image.

    What is far below the threshold stays as it is; what is above it glows.

    Args:
        image: RGB image of any size.
        anomaly_map: float32 ``(H, W)`` of any size; bilinearly resized to the image's.
        threshold: Decision threshold of the image's category.

    Returns:
        RGB image of the size of ``image``.
    """
    scaled = Image.fromarray(relative_to_threshold(anomaly_map, threshold)).resize(image.size, Image.Resampling.BILINEAR)
    warmth, pixels = np.asarray(scaled), np.array(image)
    # In strips: what a whole photograph takes in floating point is more than an edge device has.
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        heat, strip = warmth[top : top + rows], pixels[top : top + rows]
        weight = (0.75 * np.clip((heat - 0.2) / 0.4, 0, 1))[..., None]
        strip[:] = strip.astype(np.float32) * (1 - weight) + colours(heat) * weight
    return Image.fromarray(pixels)


def save_overlay(picture: Image.Image, path: Path) -> None:
    """Write a heat map as PNG, whole or not at all, marked so that ``is_overlay`` knows it wherever it is moved to.

    Raises:
        OSError: The file cannot be written.
    """
    text = PngInfo()
    text.add_text(MARK, "heat map")
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=3, pnginfo=text)


def is_overlay(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is one that ``save_overlay`` wrote: a ``.png`` with its mark; the pixels are not decoded."""
    if Path(path).suffix.lower() != ".png":
        return False
    try:
        with open_image(path) as image:
            return MARK in image.info
    except ImageError:
        return False


def outline(image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    """Draw the edge of a ground-truth mask ``(H, W)`` on an image of any size, in green."""
    size = image.size
    grown = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 0
    inner = grown.copy()
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
        inner &= np.roll(grown, shift, axis)
    pixels = np.asarray(image).copy()
    pixels[grown & ~inner] = (0, 255, 90)
    return Image.fromarray(pixels)


def panel(pictures: list[Image.Image], side: int, gap: int = 4) -> Image.Image:
    """Put pictures side by side, each fitted into a square of ``side`` pixels."""
    sheet = Image.new("RGB", (len(pictures) * side + (len(pictures) - 1) * gap, side), "white")
    for index, picture in enumerate(pictures):
        fitted = picture.copy()
        fitted.thumbnail((side, side), Image.Resampling.LANCZOS)
        left = index * (side + gap) + (side - fitted.width) // 2
        sheet.paste(fitted, (left, (side - fitted.height) // 2))
    return sheet


def label(image: Image.Image, text: str) -> Image.Image:
    """Write a line of text into the upper left corner."""
    drawn = image.copy()
    ImageDraw.Draw(drawn).text((4, 4), text, fill="white", stroke_width=2, stroke_fill="black")
    return drawn
