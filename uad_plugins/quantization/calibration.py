"""Calibration data: the run's own images, noise, or both; balanced, seeded, and written down. No torch in here."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from uad_plugins.data.samples import NORMAL, SampleTable, relative_to
from uad_plugins.errors import UadxError, UsageError, unknown_name
from uad_plugins.imaging import ImageError, read_rgb, resize_rgb
from uad_plugins.runtime.exported import FloatArray, normalise

DATASET, RANDOM_NORMAL, MIXED, NONE = "dataset", "random-normal", "mixed", "none"
SOURCES = (DATASET, RANDOM_NORMAL, MIXED)


@dataclass(frozen=True)
class Calibration(Sequence[FloatArray]):
    """Normalised images, float32 ``(1, 3, H, W)`` each, made anew whenever one is asked for.

    Attributes:
        source: ``dataset``, ``random-normal``, ``mixed`` (one of the first, one of the second, in turn) or ``none``.
        image_size: ``(height, width)``.
        mean: Of the RGB channels of images in 0..1.
        std: The same.
        seed: Of the noise and of the choice of images.
        paths: Image files; empty where there are only random tensors.
        noise: Number of random tensors.
        noise_std: Their standard deviation.
        record: What is written to the manifest.
    """

    source: Literal["dataset", "random-normal", "mixed", "none"]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int
    paths: tuple[str, ...] = ()
    noise: int = 0
    noise_std: float = 1.0
    record: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths) + self.noise

    def __getitem__(self, index: int) -> FloatArray:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        turn = min(len(self.paths), self.noise)
        if index < 2 * turn:
            return self.image(self.paths[index // 2]) if index % 2 == 0 else self._noise(index // 2)
        rest = index - turn
        return self.image(self.paths[rest]) if len(self.paths) > turn else self._noise(rest)

    def image(self, path: str) -> FloatArray:
        """Return an image as the network takes it, float32 ``(1, 3, H, W)``.

        Raises:
            ImageError: It cannot be read.
        """
        return normalise(resize_rgb(read_rgb(path), self.image_size)[None], self.mean, self.std)

    def without(self, odd: Mapping[str, str], root: Path) -> Calibration:
        """Return the same without some of its images, which are named in its record.

        Args:
            odd: Category of each image to leave out, by its path.
            root: Of the data.
        """
        kept = tuple(path for path in self.paths if path not in odd)
        left_out = sorted(relative_to(path, root) for path in odd)
        gone = Counter(odd.values())
        images = {name: count - gone[name] for name, count in self.record["images"].items()}
        facts = {"samples": len(kept) + self.noise, "images": images, "left_out": left_out, **_seal(kept, root)}
        return replace(self, paths=kept, record={**self.record, **facts})

    def held_out(self, table: SampleTable) -> Iterator[FloatArray]:
        """Yield the readable held-out normal images of a table, as the network takes them."""
        for index in table.where(split="val", label=NORMAL):
            with suppress(ImageError):
                yield self.image(table.paths[int(index)])

    def _noise(self, index: int) -> FloatArray:
        generator = np.random.default_rng([self.seed, index])
        return generator.standard_normal((1, 3, *self.image_size), dtype=np.float32) * np.float32(self.noise_std)


def calibrate(
    source: str,
    samples: int,
    table: SampleTable,
    categories: Sequence[str],
    *,
    image_size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int = 0,
    noise_std: float = 1.0,
    needed: bool = True,
) -> Calibration:
    """Choose calibration data.

    Images are normal ones of the training split, as many of each category as of any other as far as there are; the held-out
    ones are left for judging the result, and the test split is never touched.

    Args:
        source: One of ``SOURCES``.
        samples: How many; with ``dataset`` and ``mixed`` fewer where there are not enough images.
        table: Samples with their splits.
        categories: Products the run was trained on; each needs an image.
        image_size: ``(height, width)``.
        mean: Of the RGB channels of images in 0..1.
        std: The same.
        seed: Of the noise and of the choice of images.
        noise_std: Standard deviation of the noise.
        needed: False for what takes none: no image is looked for.

    Raises:
        UsageError: Unknown source, fewer samples than categories, or a deviation that is none or that nothing has.
        UadxError: A category has no readable normal training image.
    """
    if source not in SOURCES:
        raise unknown_name("calibration source", source, SOURCES)
    if samples < 1:
        raise UsageError(f"--samples {samples} makes no sense", "give at least 1")
    if not 0 < noise_std < np.inf:
        raise UsageError(f"--noise-std {noise_std:g} makes no sense", "give a number above 0; 1 is standard normal")
    if source == DATASET and noise_std != 1:
        raise UsageError("--noise-std is of noise, and --calibration dataset has none", "leave it out")
    if not needed:
        source, samples = NONE, 0
    noise = {NONE: 0, DATASET: 0, RANDOM_NORMAL: samples, MIXED: samples // 2}[source]
    paths, counts, skipped = _choose(table, categories, samples - noise, seed) if samples > noise else ([], {}, [])
    record = {
        "source": source,
        "samples": len(paths) + noise,
        "asked": samples,
        "noise": noise,
        "noise_std": noise_std if noise else None,
        "images": counts,
        "skipped": skipped,
        "left_out": [],
        **_seal(paths, table.root),
        "seed": seed,
        "shape": [1, 3, *image_size],
    }
    return Calibration(source, image_size, mean, std, seed, tuple(paths), noise, noise_std, record)  # type: ignore[arg-type]


def _seal(paths: Sequence[str], root: Path) -> dict[str, str | None]:
    """Return the hash of the names of the images, in their order."""
    names = "\n".join(relative_to(path, root) for path in paths).encode("utf-8", "surrogateescape")
    return {"images_sha256": hashlib.sha256(names).hexdigest() if paths else None}


def _choose(
    table: SampleTable, categories: Sequence[str], wanted: int, seed: int
) -> tuple[list[str], dict[str, int], list[str]]:
    """Choose readable normal training images, taking turns among the categories: paths, count of each, unreadable ones."""
    missing = [name for name in categories if name not in table.categories or not len(_normal(table, name))]
    if missing:
        raise UadxError(
            f"no normal training image of {', '.join(missing)} to calibrate with",
            "give data with all products of the run (--data), or use --calibration random-normal",
        )
    if wanted < len(categories):
        raise UsageError(
            f"{wanted} calibration images cannot cover {len(categories)} products",
            f"give --samples of at least {len(categories)}",
        )
    waiting = {
        name: np.random.default_rng([seed, number]).permutation(_normal(table, name)).tolist()
        for number, name in enumerate(categories)
    }
    chosen: list[str] = []
    skipped: list[str] = []
    counts = dict.fromkeys(categories, 0)
    while len(chosen) < wanted and any(waiting.values()):
        for name in categories:
            path = _next_readable(table, waiting[name], skipped)
            if path is not None and len(chosen) < wanted:
                chosen.append(path)
                counts[name] += 1
    unreadable = [name for name, count in counts.items() if count == 0]
    if unreadable:
        raise UadxError(f"no image of {', '.join(unreadable)} can be read", "see 'uadx data check'")
    return chosen, counts, skipped


def _normal(table: SampleTable, category: str) -> NDArray[np.int64]:
    return table.where(split="train", category=category, label=NORMAL)


def _next_readable(table: SampleTable, waiting: list[int], skipped: list[str]) -> str | None:
    while waiting:
        path = table.paths[waiting.pop()]
        try:
            read_rgb(path)
        except ImageError:
            skipped.append(path)
            continue
        return path
    return None
