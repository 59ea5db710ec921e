"""Metrics of image scores and anomaly maps, by category; memory does not grow with the number of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from anomalib.metrics.pro import connected_components_cpu
from numpy.typing import NDArray
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
)
from torchmetrics.utilities.compute import auc

METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "aupro")
"""Names of the metrics, in the order in which they are shown."""

FPR_LIMIT = 0.3
"""AUPRO is integrated up to this false-positive rate, and divided by it."""


class PixelCurves(Metric):
    """Pixel AUROC and AUPRO from histograms.

    A float32 is put into one of 2^18 bins by its leading bits (sign, exponent, 9 bits of mantissa): neighbouring bins differ
    by 0.2 %, over the whole range of floats, so no range has to be known beforehand. What is lost against the exact curves
    of ``anomalib.metrics.AUROC`` and ``AUPRO`` is the order of pixels within a bin; what is won is that no pixel is kept.
    """

    full_state_update = False
    bits = 18
    background: torch.Tensor
    foreground: torch.Tensor
    overlap: torch.Tensor
    regions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("background", "foreground", "overlap"):
            self.add_state(name, torch.zeros(1 << self.bits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("regions", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, maps: torch.Tensor, masks: torch.Tensor) -> None:
        """Add images.

        Args:
            maps: float32 ``(B, H, W)``, finite.
            masks: bool ``(B, H, W)``, True where defective.
        """
        bins = self._bins(maps).flatten()
        inside = masks.flatten()
        size = 1 << self.bits
        self.background += torch.bincount(bins[~inside], minlength=size)
        if not bool(inside.any()):
            return
        self.foreground += torch.bincount(bins[inside], minlength=size)
        for image_bins, mask in zip(bins.reshape(len(maps), -1), masks, strict=True):
            if not bool(mask.any()):
                continue
            labels = connected_components_cpu(mask[None, None].float()).flatten().long()
            areas = torch.bincount(labels).double()
            weights = 1.0 / areas[labels[labels > 0]]
            self.overlap += torch.bincount(image_bins[labels > 0], weights=weights, minlength=size)
            self.regions += int((areas[1:] > 0).sum())

    def _bins(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the bin of each value; the order of bins is the order of values."""
        pattern = maps.float().contiguous().view(torch.int32).long()
        ordered = torch.where(pattern < 0, ~pattern, pattern | (1 << 31)) & 0xFFFFFFFF
        return ordered >> (32 - self.bits)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return ``pixel_auroc`` and ``aupro``; NaN where there is no defective or no normal pixel."""
        nothing = {"pixel_auroc": torch.tensor(torch.nan), "aupro": torch.tensor(torch.nan)}
        if float(self.regions) == 0 or float(self.background.sum()) == 0:
            return nothing
        fpr, tpr, pro = (
            torch.cat([torch.zeros(1, dtype=torch.float64), values.flip(0).cumsum(0) / total])
            for values, total in (
                (self.background, self.background.sum()),
                (self.foreground, self.foreground.sum()),
                (self.overlap, self.regions),
            )
        )
        return {"pixel_auroc": auc(fpr, tpr), "aupro": _area_up_to(fpr, pro, FPR_LIMIT)}


def _area_up_to(x: torch.Tensor, y: torch.Tensor, limit: float) -> torch.Tensor:
    """Return the area under a curve up to ``limit``, as a share of ``limit``; the last piece is interpolated."""
    inside = int((x <= limit).sum())
    if inside < len(x):
        x0, x1, y0, y1 = x[inside - 1], x[inside], y[inside - 1], y[inside]
        at_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        x, y = torch.cat([x[:inside], torch.tensor([limit], dtype=x.dtype)]), torch.cat([y[:inside], at_limit[None]])
    return auc(x, y) / limit


def image_metrics(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float | None]:
    """Return AUROC, average precision and the best F1 of image scores; None where one of the two classes is missing.

    Args:
        scores: ``(N,)``, finite, higher is more anomalous.
        labels: ``(N,)``, 1 for anomalous.
    """
    if len(np.unique(labels)) < 2:
        return {"image_auroc": None, "image_ap": None, "image_f1_max": None}
    # All three depend on the order of the scores alone. Ranks in 0..1 keep torchmetrics from squashing scores above 1
    # with a sigmoid, which would tie the largest ones.
    _, ranks = np.unique(scores, return_inverse=True)
    predictions = torch.from_numpy(ranks / max(1, ranks.max())).double()
    target = torch.from_numpy(np.asarray(labels)).long()
    precision, recall, _ = binary_precision_recall_curve(predictions, target)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return {
        "image_auroc": float(binary_auroc(predictions, target)),
        "image_ap": float(binary_average_precision(predictions, target)),
        "image_f1_max": float(f1.max()),
    }


class CategoryMetrics:
    """Collects scores and maps of a test set and computes the report: each category, their mean, and all pooled."""

    def __init__(self) -> None:
        self._scores: dict[str, list[float]] = {}
        self._labels: dict[str, list[int]] = {}
        self._pixels: dict[str, PixelCurves] = {}

    def add(
        self,
        category: str,
        label: int,
        score: float,
        anomaly_map: NDArray[np.float32] | None,
        mask: NDArray[np.bool_] | None,
    ) -> None:
        """Add an image.

        Args:
            category: Its product.
            label: 1 for anomalous.
            score: Its score, finite.
            anomaly_map: float32 ``(H, W)``; looked at only with a mask.
            mask: bool ``(H, W)``; None when nothing is known of its pixels.
        """
        self._scores.setdefault(category, []).append(score)
        self._labels.setdefault(category, []).append(label)
        if mask is not None and anomaly_map is not None:
            curves = self._pixels.setdefault(category, PixelCurves())
            curves.update(torch.from_numpy(np.ascontiguousarray(anomaly_map))[None], torch.from_numpy(mask.copy())[None])

    def report(self) -> dict[str, Any]:
        """Return ``{"categories": {NAME: {...}}, "mean": {...}, "pooled": {...}}``; None where undefined."""
        categories = {
            name: self._one(self._scores[name], self._labels[name], self._pixels.get(name)) for name in sorted(self._scores)
        }
        everything: PixelCurves | None = None
        for curves in self._pixels.values():
            everything = everything or PixelCurves()
            for state in ("background", "foreground", "overlap", "regions"):
                getattr(everything, state).add_(getattr(curves, state))
            everything._update_count = 1
        pooled = self._one(
            [score for scores in self._scores.values() for score in scores],
            [label for labels in self._labels.values() for label in labels],
            everything,
        )
        return {"categories": categories, "mean": mean_over(categories), "pooled": pooled}

    @staticmethod
    def _one(scores: list[float], labels: list[int], curves: PixelCurves | None) -> dict[str, Any]:
        pixel: dict[str, float | None] = {"pixel_auroc": None, "aupro": None}
        if curves is not None:
            pixel = {name: None if torch.isnan(value) else float(value) for name, value in curves.compute().items()}
        counts = {"normal": labels.count(0), "anomalous": len(labels) - labels.count(0)}
        return {**image_metrics(np.asarray(scores), np.asarray(labels)), **pixel, **counts}


def mean_over(categories: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each metric over the categories in which it is defined; None where it is in none."""
    mean: dict[str, float | None] = {}
    for metric in METRICS:
        values = [row[metric] for row in categories.values() if row[metric] is not None]
        mean[metric] = float(np.mean(values)) if values else None
    return mean
