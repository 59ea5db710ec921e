"""Rows of results: verdicts, CSV, and which decisions were most wrong. No torch in here."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

NORMAL, ANOMALOUS, ERROR = "normal", "anomalous", "error"


def verdict(score: float, threshold: float) -> str:
    """Judge a score: above the threshold is anomalous."""
    return ANOMALOUS if score > threshold else NORMAL


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
    wrong = [row for row in rows if row["verdict"] not in {row["label"], "error"}]
    yield from sorted(wrong, key=lambda row: -abs(math.log(max(row["score"], 1e-12) / max(row["threshold"], 1e-12))))
