"""Samples and the table that holds them: a few bytes each, so that 100 000 images are nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uad_plugins.errors import UadxError, unknown_name

NORMAL, ANOMALOUS = 0, 1
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of the data set.

    Attributes:
        path: Image file, absolute.
        category: The product shown.
        label: 0 normal, 1 anomalous.
        split: ``train``, ``val`` (held out from training) or ``test``.
        mask: Ground-truth mask file, absolute; empty when there is none.
        defect: Defect type as the layout names it; ``good`` for normal images.
    """

    path: str
    category: str
    label: int
    split: str
    mask: str = ""
    defect: str = ""


class PackedStrings(Sequence[str]):
    """Strings in one byte array.

    Worker processes share it untouched; a list of Python strings would be copied page by page into every worker, by
    nothing more than counting references.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if index < 0:
            index += len(self)
        start = 0 if index == 0 else int(self._ends[index - 1])
        return self._bytes[start : int(self._ends[index])].tobytes().decode("utf-8", "surrogateescape")


class SampleTable(Sequence[Sample]):
    """An immutable table of samples, ordered by category and path.

    Args:
        samples: The samples, in any order.
        root: Folder that the data came from; paths are shown relative to it.
    """

    def __init__(self, samples: Iterable[Sample], root: Path) -> None:
        ordered = sorted(samples, key=lambda sample: (sample.category, sample.path))
        self.root = root
        self.categories = sorted({sample.category for sample in ordered})
        self.defects = sorted({sample.defect for sample in ordered})
        number = {name: index for index, name in enumerate(self.categories)}
        defect_number = {name: index for index, name in enumerate(self.defects)}
        self.paths = PackedStrings(sample.path for sample in ordered)
        self.masks = PackedStrings(sample.mask for sample in ordered)
        self.category_index: NDArray[np.int32] = np.array([number[s.category] for s in ordered], dtype=np.int32)
        self.labels: NDArray[np.int8] = np.array([s.label for s in ordered], dtype=np.int8)
        self.splits: NDArray[np.int8] = np.array([SPLITS.index(s.split) for s in ordered], dtype=np.int8)
        self._defect_index = np.array([defect_number[s.defect] for s in ordered], dtype=np.int32)
        self.has_mask: NDArray[np.bool_] = np.array([bool(s.mask) for s in ordered], dtype=bool)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return Sample(
            path=self.paths[index],
            category=self.categories[self.category_index[index]],
            label=int(self.labels[index]),
            split=SPLITS[self.splits[index]],
            mask=self.masks[index],
            defect=self.defects[self._defect_index[index]],
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def where(self, *, split: str | None = None, category: str | None = None, label: int | None = None) -> NDArray[np.int64]:
        """Return the indices of the samples that match every given criterion, in order."""
        chosen = np.ones(len(self), dtype=bool)
        if split is not None:
            chosen &= self.splits == SPLITS.index(split)
        if category is not None:
            chosen &= self.category_index == self.categories.index(category)
        if label is not None:
            chosen &= self.labels == label
        return np.flatnonzero(chosen)

    def masked_categories(self) -> list[str]:
        """Return the categories with at least one ground-truth mask in the test split."""
        test = self.splits == SPLITS.index("test")
        return [
            name
            for index, name in enumerate(self.categories)
            if bool(self.has_mask[test & (self.category_index == index)].any())
        ]

    def relative(self, index: int) -> str:
        """Return the path of a sample relative to the root where it lies below it, with forward slashes."""
        return relative_to(self.paths[index], self.root)

    def only(self, categories: Sequence[str]) -> SampleTable:
        """Return the samples of the named categories.

        Raises:
            UsageError: A category does not exist.
        """
        for name in categories:
            if name not in self.categories:
                raise unknown_name("category", name, self.categories)
        return SampleTable((sample for sample in self if sample.category in categories), self.root)

    def without(self, paths: set[str]) -> SampleTable:
        """Return the samples whose path is not in the given set."""
        return SampleTable((sample for sample in self if sample.path not in paths), self.root)

    def fingerprint(self) -> str:
        """Return a SHA-256 over relative paths, categories, labels and splits: the same data gives the same value."""
        digest = hashlib.sha256()
        for index, sample in enumerate(self):
            row = (self.relative(index), sample.category, str(sample.label), sample.split)
            digest.update("\0".join(row).encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()


def relative_to(path: str, root: Path) -> str:
    """Return ``path`` relative to ``root`` if it lies below it, with forward slashes; else unchanged."""
    prefix = str(root).rstrip("/\\")
    if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in {"/", "\\"}:
        return path[len(prefix) + 1 :].replace("\\", "/")
    return path.replace("\\", "/")


def _draw(seed: int, name: str) -> int:
    """Return a number that depends on nothing but the seed and the name: it survives added and removed files."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def hold_out(table: SampleTable, fraction: float, seed: int) -> SampleTable:
    """Move a share of each category's normal training images to the validation split.

    A category that already has normal validation images (an index file may name them) is left as it is. At least one image
    is held out, at least one stays.

    Args:
        table: Samples of any splits.
        fraction: Share of the normal training images of each category, 0..1 exclusive.
        seed: The same seed holds the same images out, wherever the data lies, and of a category's own folder too.

    Raises:
        UadxError: A category has a single training image, or anomalous images in its training split.
    """
    wrong = table.where(split="train", label=ANOMALOUS)
    if len(wrong):
        raise UadxError(
            f"{table.relative(int(wrong[0]))}: anomalous image in the training split ({len(wrong)} in all)",
            "a model learns from images of good parts only: move them to the test split",
        )
    held: set[int] = set()
    for category in table.categories:
        candidates = table.where(split="train", category=category)
        if len(candidates) == 0 or len(table.where(split="val", category=category, label=NORMAL)):
            continue
        if len(candidates) == 1:
            raise UadxError(
                f"category '{category}' has one training image: none is left to hold out",
                "add images of good parts (at least 2, better 50 or more)",
            )
        count = min(len(candidates) - 1, max(1, round(fraction * len(candidates))))
        names = {index: from_category(table.relative(index), category) for index in candidates.tolist()}
        ranked = sorted(names, key=lambda index: _draw(seed, f"val:{names[index]}"))
        held.update(ranked[:count])
    return SampleTable(
        (
            Sample(s.path, s.category, s.label, "val" if index in held else s.split, s.mask, s.defect)
            for index, s in enumerate(table)
        ),
        table.root,
    )


def from_category(name: str, category: str) -> str:
    """Return a relative path from the folder of its category on: the same where the root is that folder itself."""
    return name if name.startswith(f"{category}/") else f"{category}/{name}"


def trained_categories(table: SampleTable) -> list[str]:
    """Return the categories that have training images."""
    return [category for category in table.categories if len(table.where(split="train", category=category))]


def held_out_of(table: SampleTable) -> set[str]:
    """Return the relative paths of the normal images that are held out from training."""
    return {table.relative(int(index)) for index in table.where(split="val", label=NORMAL)}


def hold_out_as_before(table: SampleTable, held: Set[str]) -> SampleTable:
    """Split normal training images as they were split once: what was held out, and all others.

    Images that were added since are no longer kept apart from those that were trained on: they count as trained on.

    Args:
        table: Samples of any splits.
        held: Relative paths of the images that were held out.
    """
    return SampleTable(
        (
            s
            if s.split == "test" or s.label == ANOMALOUS
            else Sample(s.path, s.category, s.label, "val" if table.relative(index) in held else "train", s.mask, s.defect)
            for index, s in enumerate(table)
        ),
        table.root,
    )


def require_parts(before: SampleTable, after: SampleTable) -> None:
    """Make sure that each category still has what it is trained on and what is held out, now that bad images are left out.

    Args:
        before: All samples.
        after: The readable ones.

    Raises:
        UadxError: A category has lost all of its training or held-out images; the message names it.
    """
    for category in before.categories:
        for split, what in (("train", "training images"), ("val", "images held out from training")):
            lost = len(before.where(split=split, category=category, label=NORMAL))
            left = category in after.categories and len(after.where(split=split, category=category, label=NORMAL))
            if lost and not left:
                raise UadxError(
                    f"category '{category}': none of its {what} can be read ({lost} in all)",
                    "repair them, or name the other categories with --category; see 'uadx data check'",
                )


def split_again(table: SampleTable, origin: Mapping[str, Any]) -> SampleTable:
    """Split data as a training did.

    Args:
        table: Samples of any splits.
        origin: What the training began with, as ``Run.source`` gives it.

    Raises:
        UadxError: See ``hold_out``.
    """
    held = origin.get("held_out")
    if held is not None:
        return hold_out_as_before(table, set(held))
    return hold_out(table, float(origin.get("val_fraction", 0.1)), int(origin.get("seed", 0)))


def in_test_share(name: str, fraction: float) -> bool:
    """Decide by name alone whether a normal image of a layout without splits belongs to the test split."""
    return _draw(0, f"test:{name}") < fraction * 2**64
