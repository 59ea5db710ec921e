"""Heat maps over images, drawn as uadx draws them (``uad_plugins/evaluation/overlays.py``; a test compares both)."""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .files import write_atomically
from .imaging import MARK

STRIP = 1 << 16
"""Pixels that are blended at once."""

# Place on the scale, and colour: blue over yellow to red.
_SCALE = np.array(
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


def overlay(image: Image.Image, anomaly_map: Any, threshold: float | None) -> Image.Image:
    """Lay a map over an RGB image: what is far below the threshold stays as it is, what is above it glows.

    Args:
        image: RGB image of any size.
        anomaly_map: float32 ``(H, W)`` of any size; bilinearly resized to the image's.
        threshold: Lies in the middle of the colours; without a positive one they span the map's own range.
    """
    smooth = Image.BILINEAR  # type: ignore[attr-defined]
    scaled = Image.fromarray(_relative(anomaly_map, threshold)).resize(image.size, smooth)
    warmth, pixels = np.asarray(scaled), np.array(image)
    # In strips: what a whole photograph takes in floating point is more than the device has to spare.
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        heat, strip = warmth[top : top + rows], pixels[top : top + rows]
        weight = (0.75 * np.clip((heat - 0.2) / 0.4, 0, 1))[..., None]
        shown = np.clip(heat, 0, 1)
        colours = np.stack([np.interp(shown, _SCALE[:, 0], _SCALE[:, channel]) for channel in (1, 2, 3)], axis=-1)
        strip[:] = strip.astype(np.float32) * (1 - weight) + colours.astype(np.uint8) * weight
    return Image.fromarray(pixels)


def _relative(anomaly_map: Any, threshold: float | None) -> Any:
    if threshold is not None and threshold > 0:
        return np.clip(anomaly_map / (2 * threshold), 0, 1).astype(np.float32)
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    return ((anomaly_map - low) / max(high - low, 1e-12)).astype(np.float32)


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a heat map whole or not at all, marked so that ``is_overlay`` knows it wherever it is moved to.

    Raises:
        RunnerError: The folder cannot be written.
    """
    text = PngInfo()
    text.add_text(MARK, "heat map")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=3, pnginfo=text)
    write_atomically(path, buffer.getvalue())


def picture_names(paths: Sequence[str], out: str | Path) -> dict[str, str]:
    """Return a file name for the heat map of each image, below one output folder.

    It is the image's path below the folder that all have in common, with ``_map`` added: it cannot climb out of the output
    folder. No heat map takes the place of one of the images; images that would get the same name get a number.
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    common = os.path.commonpath([os.path.dirname(path) for path in absolute.values()]) if paths else ""
    place = lru_cache(maxsize=1024)(os.path.realpath)

    def entry(path: str) -> str:
        folder, name = os.path.split(path)
        return os.path.join(place(folder), name).casefold()

    names: dict[str, str] = {}
    taken = {entry(full) for full in absolute.values()}
    for path, full in absolute.items():
        stem, ending = os.path.splitext(os.path.relpath(full, common))
        name, number = f"{stem}_map.png", 1
        while entry(os.path.join(out, name)) in taken:
            name = f"{stem}_{ending.lstrip('.').lower()}_map.png" if number == 1 else f"{stem}_{number}_map.png"
            number += 1
        taken.add(entry(os.path.join(out, name)))
        names[path] = name
    return names
