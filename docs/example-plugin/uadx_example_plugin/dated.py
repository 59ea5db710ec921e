"""Images sorted by the day they were taken: ``CATEGORY/YYYY-MM-DD/{ok,nok}/image``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from uad_plugins.data.layouts.walking import folders, images
from uad_plugins.data.samples import ANOMALOUS, NORMAL, Sample

SUMMARY = "CATEGORY/YYYY-MM-DD/{ok,nok}: earlier days train, the last one tests"
LABELS = {"ok": NORMAL, "nok": ANOMALOUS}


def recognise(root: Path) -> float:
    """Return 1 when a sub-folder (or the root itself) has a day with a folder ``ok`` or ``nok``."""
    return 1.0 if any(_days(category) for category in [root, *folders(root)]) else 0.0


def scan(root: Path) -> Iterator[Sample]:
    """Yield the samples of every category; the root itself may be one category.

    The good images of every day but the last are trained on. All others are tested on: defective ones of earlier days too.
    """
    for category in [root] if _days(root) else folders(root):
        days = _days(category)
        for day in days:
            for kind in folders(day):
                if kind.name not in LABELS:
                    continue
                label = LABELS[kind.name]
                split = "train" if label == NORMAL and day != days[-1] else "test"
                for path in images(kind):
                    yield Sample(path, category.name, label, split, defect="good" if label == NORMAL else "nok")


def _days(category: Path) -> list[Path]:
    """Return the folders of days, the earliest first: ``folders`` sorts by name, and so sorts by day."""
    return [day for day in folders(category) if _is_day(day.name) and any(kind.name in LABELS for kind in folders(day))]


def _is_day(name: str) -> bool:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", name):
        return False
    try:
        date.fromisoformat(name)
    except ValueError:
        return False
    return True
