"""Drawing for the synthetic products: noise, light, camera, and defects that can happen to any surface.

Images are float32 arrays ``(H, W, 3)`` in 0..1, masks and weights ``(H, W)``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float32]
Rng = np.random.Generator


def grid(side: int) -> tuple[Array, Array]:
    """Return pixel centres ``(y, x)`` in -1..1, each ``(side, side)``."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y.astype(np.float32), x.astype(np.float32)


def smooth_noise(rng: Rng, side: int, cells: int) -> Array:
    """Return smooth noise of mean about 0 and deviation about 1, with ``cells`` bumps along a side."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def soft_step(value: Array, width: float) -> Array:
    """Return 0 below and 1 above zero, with a linear ramp of the given width: an antialiased edge."""
    return np.clip(value / width + 0.5, 0, 1).astype(np.float32)


def blend(image: Array, colour: Array | tuple[float, float, float], weight: Array) -> Array:
    """Lay a colour (or another image) over an image with a weight for each pixel."""
    return (image * (1 - weight[..., None]) + np.asarray(colour, dtype=np.float32) * weight[..., None]).astype(np.float32)


def photograph(rng: Rng, surface: Array) -> NDArray[np.uint8]:
    """Light a surface from one side, look at it through a camera: gradient, exposure, blur, sensor noise."""
    side = surface.shape[0]
    y, x = grid(side)
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.02, 0.08) * (np.cos(angle) * x + np.sin(angle) * y)
    lit = surface * light[..., None] * rng.uniform(0.95, 1.05)
    image = Image.fromarray((np.clip(lit, 0, 1) * 255).astype(np.uint8))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(side / 500)), dtype=np.float32)
    noisy = blurred + rng.normal(0, 2.0, blurred.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def line_weight(side: int, points: NDArray[np.floating], width: float) -> Array:
    """Draw a polyline of points ``(x, y)`` in -1..1; the width is a share of the side."""
    scale = 4
    canvas = Image.new("L", (side * scale, side * scale))
    pixels = [tuple(point) for point in ((points + 1) / 2 * side * scale).tolist()]
    ImageDraw.Draw(canvas).line(pixels, fill=255, width=max(scale, round(width * side * scale)), joint="curve")
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)


def scratch(rng: Rng, side: int, centre: tuple[float, float], reach: float) -> Array:
    """Return the weight of a scratch: a wavering line through a point."""
    angle, length = rng.uniform(0, np.pi), reach * rng.uniform(0.6, 1.0)
    along = np.linspace(-length, length, 12)
    aside = np.cumsum(rng.normal(0, length * 0.04, 12))
    x = centre[0] + along * np.cos(angle) - aside * np.sin(angle)
    y = centre[1] + along * np.sin(angle) + aside * np.cos(angle)
    return line_weight(side, np.stack([x, y], axis=1), rng.uniform(0.006, 0.012))


def blob(rng: Rng, side: int, centre: tuple[float, float], radius: float, roughness: float = 0.35) -> Array:
    """Return the weight of an irregular blob with a soft edge around a point."""
    y, x = grid(side)
    distance = np.hypot(x - centre[0], y - centre[1]) / radius
    edge = 1 - distance + roughness * smooth_noise(rng, side, max(3, round(1.5 / radius)))
    return soft_step(np.where(distance < 2.2, edge, -1).astype(np.float32), 0.25)
