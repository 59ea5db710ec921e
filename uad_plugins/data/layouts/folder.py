"""Plain folders: ``CATEGORY/{good,ANYTHING ELSE}``; the rest of the good images is tested on, and all of the others."""

from __future__ import annotations

from collections import Counter
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
        found = {kind: list(images_if_readable(kind)) for kind in folders(category) if kind != mask_root}
        flat = _flat_masks(mask_root, found) if mask_root else {}
        for kind, paths in found.items():
            normal = is_normal(kind.name)
            nested = mask_root / kind.name if mask_root and not normal else None
            masks = {} if normal else mask_index(nested) if nested and nested.is_dir() else flat
            for path in paths:
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


def _flat_masks(mask_root: Path, found: dict[Path, list[str]]) -> dict[str, str]:
    """Index the masks that lie beside each other, without those that images of two defects could claim by their name."""
    sharing = [kind for kind in found if not is_normal(kind.name) and not (mask_root / kind.name).is_dir()]
    claims = Counter(stem_below(path, kind) for kind in sharing for path in found[kind])
    return {name: mask for name, mask in mask_index(mask_root).items() if claims[name] <= 1}


def _is_category(folder: Path) -> bool:
    return any(is_normal(sub.name) for sub in folders(folder))
