"""The three synthetic products: what a good part looks like, and what can be wrong with it.

A product draws its surface from a fixed set of random numbers, so that the same part can be drawn with and without a
defect; the mask of a defect is where the two drawings differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from uad_plugins.data.products.drawing import (
    Array,
    Rng,
    blend,
    blob,
    grid,
    line_weight,
    scratch,
    smooth_noise,
    soft_step,
)


class Product(ABC):
    """A product that can be drawn, good or with one of its defects.

    Attributes:
        name: Category name.
        defects: Names of what can be wrong.
    """

    name: ClassVar[str]
    defects: ClassVar[tuple[str, ...]]

    @abstractmethod
    def draw(self, part: int, side: int, defect: str | None = None) -> Array:
        """Draw one part.

        Args:
            part: Which part: the seed of everything that varies between good ones, and of the defect.
            side: Pixels of a side.
            defect: One of ``defects``; None draws the good part.

        Returns:
            float32 ``(side, side, 3)`` in 0..1.
        """

    def _streams(self, part: int) -> tuple[Rng, Rng]:
        """Return the generator of the part's own variation and that of its defect."""
        return np.random.default_rng([part, 0]), np.random.default_rng([part, 1])


class Fabric(Product):
    """Woven cloth: two sets of threads, no two quite alike."""

    name = "fabric"
    defects = ("stain", "scratch", "hole", "pulled_thread")

    def draw(self, part: int, side: int, defect: str | None = None) -> Array:
        """Draw the cloth; see ``Product.draw``."""
        rng, fault = self._streams(part)
        y, x = grid(side)
        threads = 18
        phase_x, phase_y = rng.uniform(0, 1, 2)
        wave_x, wave_y = (0.012 * smooth_noise(rng, side, 3) for _ in range(2))
        tint = rng.normal(0, 0.05, (2, threads * 3))
        centre = (float(fault.uniform(-0.6, 0.6)), float(fault.uniform(-0.6, 0.6)))
        if defect == "pulled_thread":
            pull = np.exp(-(((x - centre[0]) / 0.35) ** 2) - ((y - centre[1]) / 0.10) ** 2)
            wave_y = wave_y + float(fault.choice([-1, 1])) * fault.uniform(0.08, 0.12) * pull
        u, v = (x + wave_x + phase_x + 2) * threads / 2, (y + wave_y + phase_y + 2) * threads / 2
        column, row = np.floor(u).astype(int), np.floor(v).astype(int)
        profile_u, profile_v = np.sin(np.pi * (u - column)), np.sin(np.pi * (v - row))
        over = (column + row) % 2 == 0
        warp = (0.45 + 0.35 * profile_u) * (1 + tint[0][column % (threads * 3)])
        weft = (0.40 + 0.35 * profile_v) * (1 + tint[1][row % (threads * 3)])
        height = np.where(over, warp, weft)
        image = (height[..., None] * np.array([0.55, 0.65, 0.85])).astype(np.float32)
        if defect == "stain":
            image = blend(image, (0.30, 0.22, 0.12), 0.75 * blob(fault, side, centre, fault.uniform(0.10, 0.22)))
        elif defect == "scratch":
            image = blend(image, (0.80, 0.82, 0.85), 0.85 * scratch(fault, side, centre, 0.35))
        elif defect == "hole":
            image = blend(image, (0.05, 0.05, 0.06), blob(fault, side, centre, fault.uniform(0.06, 0.12), 0.25))
        return image


class Washer(Product):
    """A brushed metal ring on a dark tray, turned and shifted a little."""

    name = "washer"
    defects = ("scratch", "rust", "chipped", "bent")

    def draw(self, part: int, side: int, defect: str | None = None) -> Array:
        """Draw the ring; see ``Product.draw``."""
        rng, fault = self._streams(part)
        y, x = grid(side)
        cx, cy = rng.uniform(-0.05, 0.05, 2)
        outer, inner = 0.72 + rng.uniform(-0.01, 0.01), 0.34 + rng.uniform(-0.01, 0.01)
        turn = rng.uniform(0, 2 * np.pi)
        radius, angle = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx)
        where = float(fault.uniform(0, 2 * np.pi))
        apart = np.angle(np.exp(1j * (angle - where)))
        rim = np.full_like(x, outer)
        if defect == "bent":
            rim = rim + float(fault.choice([-1, 1])) * fault.uniform(0.06, 0.10) * np.exp(-((apart / 0.35) ** 2))
        elif defect == "chipped":
            depth = fault.uniform(0.10, 0.18)
            bite = depth - np.abs(apart) * fault.uniform(0.5, 0.8) + 0.02 * smooth_noise(fault, side, 24)
            rim = rim - np.clip(bite, 0, depth)
        tray = 0.13 + 0.012 * smooth_noise(rng, side, 40)
        image = np.repeat(tray[..., None], 3, axis=2).astype(np.float32) * np.array([1.0, 1.05, 1.15], dtype=np.float32)
        rings = np.interp(radius, np.linspace(0, 1.5, 160), rng.normal(0, 1, 160))
        metal = 0.60 + 0.10 * np.cos(2 * (angle - turn)) + 0.018 * rings + 0.015 * smooth_noise(rng, side, 12)
        bevel = np.exp(-(((radius - rim + 0.03) / 0.02) ** 2)) + np.exp(-(((radius - inner - 0.03) / 0.02) ** 2))
        metal = (metal + 0.16 * bevel)[..., None] * np.array([1.0, 0.99, 0.95])
        pixel = 3.0 / side
        ring = soft_step(rim - radius, pixel) * soft_step(radius - inner, pixel)
        on_ring = (float(cx + 0.53 * np.cos(where)), float(cy + 0.53 * np.sin(where)))
        if defect == "scratch":
            metal = blend(metal.astype(np.float32), (0.22, 0.22, 0.24), 0.9 * scratch(fault, side, on_ring, 0.22))
        elif defect == "rust":
            spot = blob(fault, side, on_ring, fault.uniform(0.08, 0.15))
            metal = blend(metal.astype(np.float32), (0.45, 0.24, 0.10), 0.85 * spot)
        return blend(image, metal.astype(np.float32), ring)


class Connector(Product):
    """A plastic housing with a row of gold pins."""

    name = "connector"
    defects = ("missing_pin", "bent_pin", "stain", "scratch")
    pins = 7

    def draw(self, part: int, side: int, defect: str | None = None) -> Array:
        """Draw the connector; see ``Product.draw``."""
        rng, fault = self._streams(part)
        y, x = grid(side)
        dx, dy = rng.uniform(-0.04, 0.04, 2)
        tilt = rng.normal(0, 0.015)
        u, v = x - dx + tilt * y, y - dy - tilt * x
        board = 0.30 + 0.015 * smooth_noise(rng, side, 30)
        image = (board[..., None] * np.array([0.45, 1.0, 0.60])).astype(np.float32)
        pixel = 3.0 / side
        body = soft_step((0.80 - np.abs(u)).astype(np.float32), pixel) * soft_step(
            (0.24 - np.abs(v - 0.32)).astype(np.float32), pixel
        )
        plastic = 0.14 + 0.010 * smooth_noise(rng, side, 50) + 0.05 * np.exp(-(((v - 0.12) / 0.03) ** 2))
        image = blend(image, np.repeat(plastic[..., None], 3, axis=2).astype(np.float32), body)
        faulty = int(fault.integers(0, self.pins))
        bend = float(fault.choice([-1, 1]) * fault.uniform(0.10, 0.16))
        for pin in range(self.pins):
            bottom = np.array([-0.66 + 1.32 * pin / (self.pins - 1), 0.12])
            top = bottom + np.array([rng.normal(0, 0.005), -0.62 + rng.normal(0, 0.008)])
            gold = 0.72 + rng.normal(0, 0.02)
            if pin == faulty and defect == "missing_pin":
                continue
            middle = (bottom + top) / 2
            if pin == faulty and defect == "bent_pin":
                top = top + np.array([bend, abs(bend) * 0.4])
                middle = middle + np.array([bend * 0.2, 0.0])
            points = np.stack([bottom, middle, top]) + np.array([dx, dy])
            image = blend(image, (gold, gold * 0.82, gold * 0.42), line_weight(side, points, 0.035))
            shine = points + np.array([-0.010, 0.0])
            image = blend(image, (1.0, 0.95, 0.75), 0.6 * line_weight(side, shine, 0.008))
        centre = (float(fault.uniform(-0.6, 0.6)), float(fault.uniform(0.15, 0.50)))
        if defect == "stain":
            image = blend(image, (0.55, 0.55, 0.50), 0.7 * blob(fault, side, centre, fault.uniform(0.08, 0.15)))
        elif defect == "scratch":
            image = blend(image, (0.62, 0.62, 0.65), 0.8 * scratch(fault, side, centre, 0.25))
        return image


PRODUCTS: dict[str, Product] = {product.name: product for product in (Connector(), Fabric(), Washer())}
"""The products by category name."""
