"""Scoring image files: one row each, in their order."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Iterator, Sequence

from .bundle import Bundle
from .files import RunnerError
from .imaging import ImageError, Normaliser, read_rgb, resize_rgb
from .inference import Lane, Session
from .overlay import overlay, picture_names, write_png

READERS = 4
"""Threads that decode images."""

AHEAD = 8
"""Decoded images that may wait for the device: bounds the memory."""


@dataclass(frozen=True)
class _Decoded:
    pixels: Any
    error: str | None


def predict(
    session: Session, bundle: Bundle, paths: Sequence[str], category: str | None = None, out: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each image: ``path, category, score, threshold, verdict, map, error``.

    While one image is on the device the next is copied there, and those after it are decoded.

    Args:
        session: The engine.
        bundle: Preprocessing and thresholds.
        paths: Image files.
        category: The product shown, for its threshold; None uses the pooled one.
        out: Folder for heat maps over the images; None writes none.

    Raises:
        RunnerError: The bundle does not know the category, the device fails, or a heat map cannot be written.
    """
    threshold = bundle.threshold(category)
    names = picture_names(paths, out) if out is not None else {}
    for path, error, score, anomaly_map in _scored(session, bundle, paths):
        row = {
            "path": path,
            "category": category,
            "score": None if error else score,
            "threshold": threshold,
            "verdict": "error" if error else _verdict(score, threshold),
            "map": None,
            "error": error,
        }
        if out is not None and error is None:
            _add_map(row, anomaly_map, threshold, out / names[path])
        yield row


def _verdict(score: float, threshold: float | None) -> str:
    if threshold is None:
        return "no threshold"
    return "anomalous" if score > threshold else "normal"


def _add_map(row: dict[str, Any], anomaly_map: Any, threshold: float | None, path: Path) -> None:
    try:
        image = read_rgb(row["path"])
    except ImageError as error:
        # Gone or overwritten since it was scored.
        row["verdict"], row["error"] = "error", str(error)
        return
    write_png(path, overlay(image, anomaly_map, threshold))
    row["map"] = str(path)


def _scored(session: Session, bundle: Bundle, paths: Sequence[str]) -> Iterator[tuple[str, str | None, float, Any]]:
    normaliser = Normaliser(bundle)
    waiting: deque[tuple[str, str | None, Lane | None]] = deque()
    free = deque(session.lanes)

    def finish() -> tuple[str, str | None, float, Any]:
        path, error, lane = waiting.popleft()
        if lane is None:
            return path, error, math.nan, None
        score, anomaly_map = lane.fetch()
        free.append(lane)
        return path, None if math.isfinite(score) else "the model's score is not a finite number", score, anomaly_map

    for path, decoded in _decoded(bundle, paths):
        lane = None
        if decoded.error is None:
            lane = free.popleft()
            lane.submit(partial(normaliser.fill, decoded.pixels))
        waiting.append((path, decoded.error, lane))
        # One lane must be free for the next image, and what failed needs no waiting for.
        while waiting and (not free or waiting[0][2] is None):
            yield finish()
    while waiting:
        yield finish()


def _decoded(bundle: Bundle, paths: Sequence[str]) -> Iterator[tuple[str, _Decoded]]:
    remaining = iter(paths)
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        futures: deque[tuple[str, Future[_Decoded]]] = deque()

        def refill() -> None:
            for path in islice(remaining, AHEAD - len(futures)):
                futures.append((path, pool.submit(_decode, path, bundle)))

        refill()
        while futures:
            path, future = futures.popleft()
            refill()
            yield path, future.result()


def _decode(path: str, bundle: Bundle) -> _Decoded:
    try:
        return _Decoded(resize_rgb(read_rgb(path), bundle.height, bundle.width), None)
    except RunnerError as error:
        return _Decoded(None, str(error))
