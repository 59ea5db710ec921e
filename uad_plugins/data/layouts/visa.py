"""VisA: ``CATEGORY/Data/Images/{Normal,Anomaly}``, ``CATEGORY/Data/Masks/Anomaly``, and ``split_csv/1cls.csv``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from uad_plugins.data.layouts.index import rows_of
from uad_plugins.data.layouts.walking import child, folders, images_if_readable, mask_index, stem_below
from uad_plugins.data.samples import ANOMALOUS, NORMAL, Sample, in_test_share
from uad_plugins.errors import UadxError

SUMMARY = "CATEGORY/Data/Images/{Normal,Anomaly}, CATEGORY/Data/Masks/Anomaly, optional split_csv/1cls.csv"
SPLIT_FILE = Path("split_csv") / "1cls.csv"
TEST_SHARE = 0.2
"""Share of the normal images that is tested on where no split file says otherwise."""


def recognise(root: Path) -> float:
    """Return 1 when a sub-folder has ``Data/Images``."""
    return 1.0 if any(_images_of(folder) for folder in [root, *folders(root)]) else 0.0


def scan(root: Path) -> Iterator[Sample]:
    """Yield the samples of every category, split as the official file says, else one normal image in five for testing.

    Raises:
        UadxError: The official file cannot be read, or names images of a category, but none that is there.
    """
    # The split file lies at the top of the data set, also when one category alone is looked at.
    top = next((folder for folder in (root, root.parent) if (folder / SPLIT_FILE).is_file()), root)
    official = _official_split(top / SPLIT_FILE, top)
    mentioned = {part for path in official for part in Path(path).relative_to(top).parts}
    for category in [root] if _images_of(root) else folders(root):
        pictures = _images_of(category)
        if pictures is None:
            continue
        mask_root = child(pictures.parent, "masks")
        mask_folder = child(mask_root, "anomaly") if mask_root else None
        masks = mask_index(mask_folder) if mask_folder else {}
        found = {kind: list(images_if_readable(kind)) for kind in folders(pictures)}
        if category.name in mentioned and not any(path in official for paths in found.values() for path in paths):
            raise UadxError(
                f"{top / SPLIT_FILE}: names none of the images of '{category.name}' that are there",
                f"its paths begin at the folder of {SPLIT_FILE.parts[0]}: {category.name}/Data/Images/Normal/…; without "
                "the file one good image in five is tested on",
            )
        for kind, paths in found.items():
            normal = kind.name.lower() == "normal"
            for path in paths:
                name = stem_below(path, kind)
                split = official.get(path) or (
                    "train" if normal and not in_test_share(f"{category.name}/{name}", TEST_SHARE) else "test"
                )
                yield Sample(
                    path=path,
                    category=category.name,
                    label=NORMAL if normal else ANOMALOUS,
                    split=split,
                    mask="" if normal else masks.get(name, ""),
                    defect="good" if normal else kind.name.lower(),
                )


def _images_of(category: Path) -> Path | None:
    data = child(category, "data")
    return child(data, "images") if data else None


def _official_split(path: Path, root: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    split: dict[str, str] = {}
    for line, row in rows_of(path):
        if not row.get("image") or row.get("split") not in {"train", "test"}:
            raise UadxError(f"{path}:{line}: no image, or a split other than train and test", "repair the file")
        split[os.path.normpath(root / row["image"].replace("\\", "/"))] = row["split"]
    return split
