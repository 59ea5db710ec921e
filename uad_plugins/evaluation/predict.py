"""Predicting images that have no label: files, folders and globs. No torch in here."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from uad_plugins.data.layouts.walking import images
from uad_plugins.detector import BATCH_SIZE, Detector, Prediction
from uad_plugins.errors import UsageError, reason_of, unknown_name
from uad_plugins.evaluation.overlays import is_overlay, overlay, save_overlay
from uad_plugins.evaluation.rows import ERROR, picture_names, plain_threshold, verdict
from uad_plugins.imaging import ImageError, read_rgb
from uad_plugins.progress import Progress

PREDICTIONS = "predictions.csv"
"""The rows, beside the heat maps."""


def find_images(words: Sequence[str]) -> list[str]:
    """Turn files, folders and globs into a list of image paths, in the order given, each once.

    A word that names nothing stays in the list: it will get an error in its row. Heat maps of earlier calls are left out
    of folders and globs; a file that was named itself is taken whatever it is.
    """
    found: dict[str, None] = {}
    for word in words:
        if not word:
            # Of a variable that is not set: not the folder where one is.
            found[word] = None
            continue
        path = Path(word).expanduser()
        if os.path.isdir(path):  # noqa: PTH112
            found.update(dict.fromkeys(_below(path)))
        elif os.path.exists(path) or not glob.has_magic(word):  # noqa: PTH110
            found[str(path)] = None
        else:
            matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
            for match in map(Path, matches):
                found.update(dict.fromkeys(_below(match) if os.path.isdir(match) else _no_overlays([str(match)])))  # noqa: PTH112
            if not matches:
                found[word] = None
    return list(found)


def _below(folder: Path) -> list[str]:
    """Return the images below a folder; one that may not be read stands for itself, and gets an error in its row."""
    try:
        return _no_overlays(sorted(images(folder)))
    except PermissionError:
        return [str(folder)]


def _no_overlays(paths: list[str]) -> list[str]:
    return [path for path in paths if not is_overlay(path)]


def predict(
    detector: Detector,
    paths: Sequence[str],
    *,
    category: str | None = None,
    out: Path | None = None,
    names: Mapping[str, str] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one row an image: ``path, category, score, threshold, verdict, map, error``.

    The verdict is ``normal``, ``anomalous``, ``error``, or ``no threshold`` where none was set; the threshold is None then.

    Args:
        detector: What scores them.
        paths: Image files.
        category: The product shown, for its threshold; None uses the pooled threshold.
        out: Folder for overlays at the size of each source image; None writes none.
        names: Overlay of each image, by its path below ``out``; None: named after the images.
        batch_size: Images scored together.
        progress: Called as images are done.

    An image whose overlay cannot be written gets an error in its row, like one that cannot be read.

    Raises:
        UsageError: The detector does not know the category, or there is no image.
    """
    if category is not None and category not in detector.categories:
        raise unknown_name("category", category, detector.categories)
    if not paths:
        readable = "PNG, JPEG, BMP, TIFF and WebP are read, heat maps only where the file itself is named"
        raise UsageError("no image to predict", f"give files, folders or globs; {readable}")
    threshold = detector.thresholds.of(category)
    names = picture_names(paths, ".png", out) if names is None and out is not None else names or {}
    predictions = detector.stream(paths, categories=repeat(category), batch_size=batch_size)
    for done, prediction in enumerate(predictions, start=1):
        row = _row(prediction, category, threshold)
        if out is not None and row["error"] is None:
            row["map"] = _write_overlay(prediction, threshold, out / names[prediction.path], row)
        yield row
        if progress is not None:
            progress(done, len(paths))


def _row(prediction: Prediction, category: str | None, threshold: float) -> dict[str, Any]:
    error = prediction.failure or None
    return {
        "path": prediction.path,
        "category": category,
        "score": None if error else prediction.score,
        "threshold": plain_threshold(threshold),
        "verdict": ERROR if error else verdict(prediction.score, threshold),
        "map": None,
        "error": error,
    }


def _write_overlay(prediction: Prediction, threshold: float, path: Path, row: dict[str, Any]) -> str | None:
    assert prediction.anomaly_map is not None  # only readable images get here
    try:
        image = read_rgb(prediction.path)
    except ImageError as error:
        # Gone or overwritten since it was scored.
        row["verdict"], row["error"] = ERROR, error.message
        return None
    try:
        save_overlay(overlay(image, prediction.anomaly_map, threshold), path)
    except OSError as error:
        # A name too long, a full disk: the images after it must not suffer from it.
        row["verdict"], row["error"] = ERROR, f"its heat map cannot be written: {error.strerror or reason_of(error)}"
        return None
    return str(path)
