"""Drawn images that stand in for natural ones where there are none: a dead-leaves model with textures.

Occluding shapes of power-law sizes, shading and noise give the edges, corners and textures that natural images have at
every scale (Lee, Mumford, Huang 2001; Baradad et al. 2021 train feature extractors on them).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from uad_plugins.imaging import RgbImage
from uad_plugins.models.uninformed_students.patches import PatchSource

SIDE = 192
"""Side of an image in pixels."""

COUNT = 4096
"""How many different images there are."""


def procedural_image(number: int) -> RgbImage:
    """Draw image ``number``; the same number gives the same image. uint8 ``(192, 192, 3)``."""
    rng = np.random.default_rng((20240703, number))
    palette = _palette(rng)
    image = Image.fromarray(_texture(rng, palette[0], (SIDE, SIDE)))
    exponent = rng.uniform(1.5, 3.0)
    low, high = 2.0, SIDE / 2
    for _ in range(int(rng.integers(60, 400))):
        share = rng.random()
        # Inverse of the cumulative distribution of r^-exponent between the smallest and the largest radius.
        power = 1 - exponent
        radius = (low**power + share * (high**power - low**power)) ** (1 / power)
        _leaf(image, rng, palette[int(rng.integers(1, len(palette)))], radius)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.5))))
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.25:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    noise = rng.normal(0, rng.uniform(0, 6), size=pixels.shape[:2])[..., None]
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def procedural_source() -> PatchSource:
    """Return the drawn images as a source of patches."""
    return PatchSource(procedural_image, COUNT, f"dead leaves 1, {COUNT} of {SIDE}x{SIDE}", f"{COUNT} drawn images")


def _palette(rng: np.random.Generator) -> NDArray[np.float32]:
    """Colours of one image: around a base colour, as those of a scene are."""
    base, spread = rng.uniform(40, 215) + rng.normal(0, 25, size=3), rng.uniform(15, 70)
    grey = rng.normal(0, spread, size=(8, 1))
    return np.clip(base + grey + rng.normal(0, spread / 2, size=(8, 3)), 0, 255).astype(np.float32)


def _texture(rng: np.random.Generator, colour: NDArray[np.float32], size: tuple[int, int]) -> RgbImage:
    """Fill with a colour, shading, and stripes or smooth noise."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    field = rng.uniform(-40, 40) * (along / max(size) - 0.5)
    kind = rng.random()
    if kind < 0.3:
        field = field + rng.uniform(5, 45) * np.sin(along * 2 * np.pi / rng.uniform(2.5, 20) + rng.uniform(0, 6))
    elif kind < 0.75:
        coarse = max(2, int(max(size) / rng.uniform(1.5, 16)))
        grid = rng.normal(0, rng.uniform(5, 40), size=(coarse, coarse)).astype(np.float32)
        field = field + np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(colour + field[..., None], 0, 255).astype(np.uint8)


def _leaf(image: Image.Image, rng: np.random.Generator, colour: NDArray[np.float32], radius: float) -> None:
    """Paste a disc, a box, a polygon or a bar over the image."""
    side = max(4, round(2 * radius))
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    kind = rng.integers(0, 4)
    if kind == 0:
        draw.ellipse((0, round(side * rng.uniform(0, 0.4)), side - 1, side - 1), fill=255)
    elif kind == 1:
        draw.rectangle((0, round(side * rng.uniform(0, 0.6)), side - 1, side - 1), fill=255)
    elif kind == 2:
        angles = np.sort(rng.uniform(0, 2 * np.pi, size=int(rng.integers(3, 9))))
        reach = side / 2 * rng.uniform(0.5, 1.0, size=len(angles))
        points = np.stack([side / 2 + reach * np.cos(angles), side / 2 + reach * np.sin(angles)], axis=1)
        draw.polygon([(float(px), float(py)) for px, py in points], fill=255)
    else:
        draw.line((0, 0, side - 1, side - 1), fill=255, width=max(1, int(side * rng.uniform(0.05, 0.3))))
    mask = mask.rotate(float(rng.uniform(0, 360)))
    fill = Image.fromarray(_texture(rng, colour, (side, side)))
    corner = rng.uniform(-radius, SIDE - radius, size=2).round().astype(int)
    image.paste(fill, (int(corner[0]), int(corner[1])), mask)
