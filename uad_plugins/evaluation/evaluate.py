"""Measuring a detector on a labelled test set: the same report at every station."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uad_plugins.artifacts import atomic_path, write_json, write_text
from uad_plugins.data.samples import NORMAL, Sample, SampleTable, relative_to
from uad_plugins.detector import Detector, Prediction
from uad_plugins.errors import UadxError, reason_of
from uad_plugins.evaluation.metrics import CategoryMetrics
from uad_plugins.evaluation.overlays import label, outline, overlay, panel
from uad_plugins.evaluation.rows import ERROR, NO_THRESHOLD, describe, picture_names, plain_threshold, to_csv, verdict
from uad_plugins.imaging import ImageError, misfit, read_mask, read_rgb, resize_mask
from uad_plugins.progress import Progress


@dataclass
class Picture:
    """A picture written: image with its ground truth beside its heat map; the examples go into the report."""

    category: str
    caption: str
    path: Path
    example: bool


@dataclass
class Evaluation:
    """The outcome of ``evaluate``.

    Attributes:
        report: Metrics as ``CategoryMetrics.report`` gives them, with ``decisions`` (how the stored thresholds did),
            ``unreadable`` (reason by path), ``left_out`` (products that were not measured) and ``detector``.
        rows: One dictionary an image.
        pictures: Examples written, when an output folder was given.
        without_picture: Why a picture could not be written, by path.
    """

    report: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    without_picture: dict[str, str] = field(default_factory=dict)


def evaluate(
    detector: Detector,
    table: SampleTable,
    *,
    out: Path | None = None,
    all_maps: bool = False,
    examples: int = 4,
    left_out: Sequence[str] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Score the test split and compute the report.

    Args:
        detector: What is measured.
        table: Samples of the data set; those of the test split are used.
        out: Folder for ``report.json``, ``scores.csv`` and pictures; None writes nothing.
        all_maps: Write the heat map of every test image, not of a few examples.
        examples: Pictures of each category.
        left_out: Products that were there and are not in the table; the report names them.
        progress: Called with images done and images in all.

    Raises:
        UadxError: There is no test image, or none could be read.
    """
    indices = table.where(split="test").tolist()
    if not indices:
        raise UadxError(f"{table.root}: no test images", "put them into CATEGORY/test/good and CATEGORY/test/DEFECT")
    shown = _examples(table, examples)
    names = picture_names([table.paths[index] for index in indices], ".jpg", out / "maps") if out is not None else {}
    masked = set(table.masked_categories())
    metrics, result = CategoryMetrics(), Evaluation({})
    unreadable: dict[str, str] = {}
    predictions = detector.stream(
        (table.paths[index] for index in indices),
        categories=(table.categories[int(table.category_index[index])] for index in indices),
    )
    for done, (index, prediction) in enumerate(zip(indices, predictions, strict=True), start=1):
        sample = table[index]
        error = prediction.failure
        mask = None
        if not error and sample.category in masked and prediction.anomaly_map is not None:
            mask = _truth(sample, prediction, table, unreadable)
        if error:
            unreadable[table.relative(index)] = error
        else:
            metrics.add(sample.category, sample.label, prediction.score, prediction.anomaly_map, mask)
        result.rows.append(_row(detector, table, index, sample, prediction, error))
        if out is not None and (all_maps or index in shown) and not error:
            path = out / "maps" / names[sample.path]
            caption = f"{table.relative(index)}: {verdict(prediction.score, detector.thresholds.of(sample.category))}"
            try:
                _write_picture(detector, sample, prediction, mask, path)
                result.pictures.append(Picture(sample.category, caption, path, index in shown))
            except ImageError as problem:
                # Gone or overwritten since it was scored.
                result.without_picture[table.relative(index)] = problem.message
            except OSError as problem:
                # A name too long, a full disk: the figures are worth more than the picture.
                result.without_picture[table.relative(index)] = problem.strerror or reason_of(problem)
        if progress is not None:
            progress(done, len(indices))
    if len(unreadable) >= len(indices) and all(row["verdict"] == "error" for row in result.rows):
        raise UadxError(f"{table.root}: no test image could be read", next(iter(unreadable.values())))
    result.report = {
        **metrics.report(),
        "decisions": _decisions(result.rows),
        "unreadable": unreadable,
        "left_out": list(left_out),
        "detector": {"name": detector.name, "engine": detector.engine, "image_size": list(detector.image_size)},
    }
    if out is not None:
        write_json(out / "report.json", result.report)
        write_text(out / "scores.csv", to_csv(result.rows))
    return result


def _examples(table: SampleTable, count: int) -> set[int]:
    """Choose for each category one normal test image and defective ones spread over the defect types."""
    chosen: set[int] = set()
    for category in table.categories:
        normal = table.where(split="test", category=category, label=NORMAL)
        anomalous = table.where(split="test", category=category, label=1)
        chosen.update(normal[:1].tolist())
        spread = np.linspace(0, len(anomalous) - 1, num=max(0, min(count - 1, len(anomalous)))).round().astype(int)
        chosen.update(anomalous[spread].tolist())
    return chosen


def _truth(
    sample: Sample, prediction: Prediction, table: SampleTable, unreadable: dict[str, str]
) -> NDArray[np.bool_] | None:
    """Return the ground truth at the map's size; None where a defective image has no usable mask."""
    assert prediction.anomaly_map is not None
    height, width = shape = prediction.anomaly_map.shape
    if sample.mask:
        try:
            mask = read_mask(sample.mask)
            reason = misfit(mask, prediction.size)
        except ImageError as error:
            reason = error.message.removeprefix(f"{sample.mask}: ")
        if not reason:
            return resize_mask(mask, (height, width))
        unreadable[relative_to(sample.mask, table.root)] = f"{reason}; its image counts, its pixels do not"
        return None
    return np.zeros(shape, dtype=bool) if sample.label == NORMAL else None


def _row(
    detector: Detector, table: SampleTable, index: int, sample: Sample, prediction: Prediction, error: str
) -> dict[str, Any]:
    threshold = detector.thresholds.of(sample.category)
    return {
        "path": table.relative(index),
        "category": sample.category,
        "defect": sample.defect,
        "label": "normal" if sample.label == NORMAL else "anomalous",
        "score": None if error else prediction.score,
        "threshold": plain_threshold(threshold),
        "verdict": ERROR if error else verdict(prediction.score, threshold),
        "error": error,
    }


def _write_picture(
    detector: Detector, sample: Sample, prediction: Prediction, mask: NDArray[np.bool_] | None, path: Path
) -> None:
    """Write the image with its ground truth beside its heat map."""
    image = read_rgb(sample.path)
    assert prediction.anomaly_map is not None  # only readable images get here
    threshold = detector.thresholds.of(sample.category)
    heat = overlay(image, prediction.anomaly_map, threshold)
    judged = f"{describe(prediction.score, threshold)}: {verdict(prediction.score, threshold)}"
    truth = outline(image, mask) if mask is not None and mask.any() else image
    with atomic_path(path) as temporary:
        panel([label(truth, sample.defect), label(heat, judged)], 256).save(temporary, format="JPEG", quality=88)


def _decisions(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how the stored thresholds decided: share of normal images rejected, share of anomalous ones found."""
    decisions: dict[str, dict[str, Any]] = {}
    for category in sorted({row["category"] for row in rows}):
        mine = [row for row in rows if row["category"] == category and row["verdict"] not in {ERROR, NO_THRESHOLD}]

        def share(label_name: str, mine: list[dict[str, Any]] = mine) -> float | None:
            of_label = [row["verdict"] == "anomalous" for row in mine if row["label"] == label_name]
            return sum(of_label) / len(of_label) if of_label else None

        decisions[category] = {
            "threshold": next(row["threshold"] for row in rows if row["category"] == category),
            "false_positive_rate": share("normal"),
            "true_positive_rate": share("anomalous"),
        }
    return decisions
