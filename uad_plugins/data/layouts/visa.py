"""VisA: ``CATEGORY/Data/Images/{Normal,Anomaly}``, ``CATEGORY/Data/Masks/Anomaly``, and ``split_csv/1cls.csv``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

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
    """Yield the samples of every category, split as the official file says, else one normal image in five for testing."""
    # The split file lies at the top of the data set, also when one category alone is looked at.
    top = next((folder for folder in (root, root.parent) if (folder / SPLIT_FILE).is_file()), root)
    official = _official_split(top / SPLIT_FILE, top)
    for category in [root] if _images_of(root) else folders(root):
        pictures = _images_of(category)
        if pictures is None:
            continue
        mask_root = child(pictures.parent, "masks")
        mask_folder = child(mask_root, "anomaly") if mask_root else None
        masks = mask_index(mask_folder) if mask_folder else {}
        for kind in folders(pictures):
            normal = kind.name.lower() == "normal"
            for path in images_if_readable(kind):
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
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if not row.get("image") or row.get("split") not in {"train", "test"}:
                raise UadxError(
                    f"{path}:{reader.line_num}: no image, or a split other than train and test", "repair the file"
                )
            split[str(root / row["image"])] = row["split"]
    return split
