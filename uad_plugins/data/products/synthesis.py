"""Writes the synthetic products as a data set in MVTec AD layout."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from uad_plugins.data.products.catalogue import PRODUCTS, Product
from uad_plugins.data.products.drawing import photograph
from uad_plugins.errors import UadxError, UsageError, unknown_name
from uad_plugins.progress import Progress

VISIBLE = 0.05
"""Brightness difference, of 1, from which on a pixel belongs to a defect."""


def make_part(product: Product, part: int, side: int, defect: str | None) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Photograph one part.

    Args:
        product: What to draw.
        part: Seed of the part.
        side: Pixels of a side.
        defect: One of the product's defects, or None for a good part.

    Returns:
        The uint8 RGB image ``(side, side, 3)`` and the bool mask ``(side, side)`` of its defect.
    """
    rng = np.random.default_rng([part, 2])
    good = product.draw(part, side)
    if defect is None:
        return photograph(rng, good), np.zeros((side, side), dtype=bool)
    bad = product.draw(part, side, defect)
    differs = np.abs(bad - good).max(axis=2) > VISIBLE
    # Closed and one pixel wider: an annotator would not leave holes in a defect either.
    reach = side // 32 // 2 * 2 + 3
    closed = (
        Image.fromarray(differs).convert("L").filter(ImageFilter.MaxFilter(reach)).filter(ImageFilter.MinFilter(reach - 2))
    )
    return photograph(rng, bad), np.asarray(closed) > 0


def synthesize(
    out: Path,
    *,
    products: Sequence[str] | None = None,
    side: int = 256,
    train: int = 60,
    test: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a data set: ``train`` good images a product, and ``test`` good and ``test`` defective ones.

    Args:
        out: Folder to make; must not exist or be empty.
        products: Names out of ``PRODUCTS``; None makes all.
        side: Pixels of a side.
        train: Training images of each product.
        test: Good test images of each product; as many defective ones, shared out over its defects.
        seed: The same seed makes the same images.
        progress: Called with images done and images in all.

    Raises:
        UadxError: The folder exists and is not empty, or is a file.
        UsageError: Unknown product, or a number that makes no sense.
    """
    names = list(products or PRODUCTS)
    for name in names:
        if name not in PRODUCTS:
            raise unknown_name("product", name, PRODUCTS)
    for name, number, least in (("side", side, 32), ("train", train, 2), ("test", test, 0)):
        if number < least:
            raise UsageError(f"{name} of a synthetic data set must be at least {least}, not {number}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UadxError(f"{out}: exists and is not an empty folder", "name a new folder")
    # A folder that is there stays, whether it is a link, a mounted volume, or where one is: it is filled at the end.
    there = out.is_dir()
    home = out if there else out.parent
    home.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=home))
    try:
        total, done = len(names) * (train + 2 * test), 0
        for name in names:
            product = PRODUCTS[name]
            good: list[str] = ["train/good"] * train + ["test/good"] * test
            plan: list[tuple[str, str | None]] = [(folder, None) for folder in good]
            plan += [
                (f"test/{defect}", defect) for defect in (product.defects[i % len(product.defects)] for i in range(test))
            ]
            for number, (folder, defect) in enumerate(plan):
                part = zlib.crc32(f"{seed}:{name}:{number}".encode())
                image, mask = make_part(product, part, side, defect)
                _write(image, building / name / folder / f"{number:04d}.png")
                if defect is not None:
                    truth = building / name / "ground_truth" / defect / f"{number:04d}_mask.png"
                    _write((mask * 255).astype(np.uint8), truth)
                done += 1
                if progress is not None:
                    progress(done, total)
        if there:
            for made in sorted(building.iterdir()):
                os.replace(made, out / made.name)  # noqa: PTH105
        else:
            building.chmod(0o755)
            os.replace(building, out)  # noqa: PTH105
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def _write(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)
