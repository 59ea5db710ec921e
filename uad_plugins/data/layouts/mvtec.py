"""MVTec AD: ``CATEGORY/train/good``, ``CATEGORY/test/{good,DEFECT}``, ``CATEGORY/ground_truth/DEFECT/NAME_mask.png``."""

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
from uad_plugins.data.samples import ANOMALOUS, NORMAL, Sample

SUMMARY = "CATEGORY/train/good, CATEGORY/test/{good,DEFECT}, optional CATEGORY/ground_truth/DEFECT/NAME_mask.png"


def recognise(root: Path) -> float:
    """Return 1 for folders with ``train/good``, 0.9 for those with a test split alone."""
    return max((_confidence(folder) for folder in [root, *folders(root)]), default=0.0)


def scan(root: Path) -> Iterator[Sample]:
    """Yield the samples of every category; the root itself may be one category."""
    for category in [root] if _confidence(root) > 0 else folders(root):
        if _confidence(category) > 0:
            yield from _scan_category(category)


def _confidence(folder: Path) -> float:
    train, test = child(folder, "train"), child(folder, "test")
    if train is not None and any(is_normal(sub.name) for sub in folders(train)):
        return 1.0
    return 0.9 if test is not None and folders(test) else 0.0


def _scan_category(category: Path) -> Iterator[Sample]:
    truth = child(category, *MASK_FOLDERS)
    for split_name, split in (("train", "train"), ("validation", "val"), ("val", "val"), ("test", "test")):
        split_folder = child(category, split_name)
        for kind in folders(split_folder) if split_folder else []:
            normal = is_normal(kind.name)
            mask_folder = truth / kind.name if truth and not normal else None
            masks = mask_index(mask_folder) if mask_folder and mask_folder.is_dir() else {}
            for path in images_if_readable(kind):
                yield Sample(
                    path=path,
                    category=category.name,
                    label=NORMAL if normal else ANOMALOUS,
                    split=split,
                    mask=masks.get(stem_below(path, kind), ""),
                    defect="good" if normal else kind.name,
                )
