"""Rows of results: verdicts, CSV, and which decisions were most wrong. No torch in here."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, count
from typing import Any

NORMAL, ANOMALOUS, ERROR, NO_THRESHOLD = "normal", "anomalous", "error", "no threshold"


def verdict(score: float, threshold: float) -> str:
    """Judge a score: above the threshold is anomalous; without a finite score or threshold there is nothing to judge."""
    if not math.isfinite(score):
        return ERROR
    if not math.isfinite(threshold):
        return NO_THRESHOLD
    return ANOMALOUS if score > threshold else NORMAL


def plain_threshold(threshold: float) -> float | None:
    """Return a threshold as JSON can hold it: None where none was set."""
    return threshold if math.isfinite(threshold) else None


def describe(score: float, threshold: float | None) -> str:
    """Write a score for people: as a multiple of its threshold where that means something."""
    if threshold is None or not math.isfinite(threshold):
        return f"{score:.4g} ({NO_THRESHOLD})"
    if threshold > 0 and score >= 0:
        return f"{score / threshold:.2f} x threshold"
    return f"{score:.4g} (threshold {threshold:.4g})"


def picture_names(paths: Sequence[str], ending: str, out: str | os.PathLike[str]) -> dict[str, str]:
    """Return a file name for the picture of each image, below one output folder.

    It is the image's path below the folder that all have in common, with ``_map`` added: it cannot climb out of the output
    folder. No picture takes the place of one of the images, whatever these are called and wherever the output folder lies;
    images that differ in their ending alone get different names.

    Args:
        paths: Image files.
        ending: Of the pictures, with its dot.
        out: The output folder.
    """
    absolute = {path: os.path.abspath(path) for path in paths}  # noqa: PTH100
    common = os.path.commonpath([os.path.dirname(path) for path in absolute.values()]) if paths else ""  # noqa: PTH120
    place = lru_cache(maxsize=1024)(os.path.realpath)

    def entry(path: str) -> str:
        # A picture replaces an entry of a folder, so that is what must differ; on some disks letter case does not count.
        folder, name = os.path.split(path)
        return os.path.join(place(folder), name).casefold()  # noqa: PTH118

    names: dict[str, str] = {}
    taken = {entry(full) for full in absolute.values()}
    for path, full in absolute.items():
        stem, own_ending = os.path.splitext(os.path.relpath(full, common))  # noqa: PTH122
        candidates = chain(
            [f"{stem}_map{ending}", f"{stem}_{own_ending.lstrip('.').lower()}_map{ending}"],
            (f"{stem}_{number}_map{ending}" for number in count(2)),
        )
        names[path] = next(name for name in candidates if entry(os.path.join(out, name)) not in taken)  # noqa: PTH118
        taken.add(entry(os.path.join(out, names[path])))  # noqa: PTH118
    return names


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Write rows of equal keys as CSV."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()


def worst_first(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the wrongly decided images, the most wrong first."""
    wrong = [row for row in rows if row["verdict"] not in {row["label"], ERROR, NO_THRESHOLD}]

    def distance(row: dict[str, Any]) -> float:
        score, threshold = row["score"], row["threshold"]
        if score > 0 and threshold > 0:
            return abs(math.log(score / threshold))
        return float(abs(score - threshold))

    yield from sorted(wrong, key=distance, reverse=True)
