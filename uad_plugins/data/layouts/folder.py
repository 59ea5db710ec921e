"""Plain folders: ``CATEGORY/{good,ANYTHING ELSE}``; the rest of the good images is tested on, and all of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from uad_plugins.data.layouts.walking import (
    MASK_FOLDERS,
    child,
    folders,
    images_if_readable,
    is_normal,
    mask_index,
    stem_below,
)
from uad_plugins.data.samples import ANOMALOUS, NORMAL, Sample, in_test_share

SUMMARY = "CATEGORY/{good,bad or any defect name}, optional CATEGORY/masks/[DEFECT/]NAME.png"
TEST_SHARE = 0.2
"""Share of the good images that is kept for testing, chosen by name."""


def recognise(root: Path) -> float:
    """Return 0.5 when a sub-folder (or the root itself) has a folder of good images."""
    return 0.5 if any(_is_category(folder) for folder in [root, *folders(root)]) else 0.0


def scan(root: Path) -> Iterator[Sample]:
    """Yield the samples of every category; the root itself may be one category."""
    for category in [root] if _is_category(root) else folders(root):
        if not _is_category(category):
            continue
        mask_root = child(category, *MASK_FOLDERS)
        for kind in folders(category):
            if kind == mask_root:
                continue
            normal = is_normal(kind.name)
            masks: dict[str, str] = {}
            if mask_root and not normal:
                nested = mask_root / kind.name
                masks = mask_index(nested if nested.is_dir() else mask_root)
            for path in images_if_readable(kind):
                name = stem_below(path, kind)
                train = normal and not in_test_share(f"{category.name}/{kind.name}/{name}", TEST_SHARE)
                yield Sample(
                    path=path,
                    category=category.name,
                    label=NORMAL if normal else ANOMALOUS,
                    split="train" if train else "test",
                    mask=masks.get(name, ""),
                    defect="good" if normal else kind.name,
                )


def _is_category(folder: Path) -> bool:
    return any(is_normal(sub.name) for sub in folders(folder))
