"""Agreement of two detectors on the same images: does the quantized one still say what the float one says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uad_plugins.data.samples import NORMAL, SampleTable
from uad_plugins.detector import Detector
from uad_plugins.errors import UadxError


@dataclass(frozen=True)
class Limits:
    """What is still agreement.

    Attributes:
        map_l2: Highest relative L2 distance of the maps.
        map_rank: Lowest rank correlation of a map's pixels, mean over images.
        score_l2: Highest relative L2 distance of the scores.
    """

    map_l2: float
    map_rank: float
    score_l2: float


ENGINES = Limits(map_l2=0.03, map_rank=0.95, score_l2=0.03)
"""Between engines that run the same file: they differ in how they round halves, which cascades through the layers."""

AGAINST_FP32 = {
    "fp32": Limits(map_l2=1e-3, map_rank=0.999, score_l2=1e-3),
    "fp16": Limits(map_l2=0.02, map_rank=0.99, score_l2=0.02),
    "int8": Limits(map_l2=0.5, map_rank=0.7, score_l2=0.5),
}
"""Against FP32 on normal images, where maps are small and rounding weighs most: what is beyond has collapsed."""

TRAINED = Limits(map_l2=0.9, map_rank=0.5, score_l2=0.9)
"""Against FP32 after more training: the student knows normal images better than before, and is expected to differ."""


@dataclass(frozen=True)
class Agreement:
    """How two detectors agree.

    Attributes:
        images: Number of images compared.
        map_l2: Relative L2 distance of the maps, over all pixels of all images. Where zero is arbitrary, of what is left
            of them after their mean.
        map_rank: Spearman's rank correlation of a map's pixels, mean over images.
        score_l2: Relative L2 distance of the scores; as above.
        score_rank: Spearman's rank correlation of the scores; None with fewer than three images.
    """

    images: int
    map_l2: float
    map_rank: float
    score_l2: float
    score_rank: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; what is not a finite number becomes None."""
        return {name: value if value is None or np.isfinite(value) else None for name, value in asdict(self).items()}

    def wrong(self, limits: Limits) -> list[str]:
        """Return in words what is beyond the limits."""
        found = []
        if not self.map_l2 <= limits.map_l2:
            found.append(f"maps differ by {self.map_l2:.3f} (relative L2, limit {limits.map_l2})")
        if not self.map_rank >= limits.map_rank:
            found.append(f"pixels of the maps rank otherwise (correlation {self.map_rank:.3f}, limit {limits.map_rank})")
        if not self.score_l2 <= limits.score_l2:
            found.append(f"scores differ by {self.score_l2:.3f} (relative L2, limit {limits.score_l2})")
        return found


def held_out(table: SampleTable, categories: Sequence[str], count: int) -> list[str]:
    """Return paths of held-out normal images, the categories taking turns.

    Raises:
        UadxError: There is none.
    """
    each = [table.where(split="val", category=name, label=NORMAL) for name in categories if name in table.categories]
    rounds = max((len(indices) for indices in each), default=0)
    paths = [table.paths[int(indices[turn])] for turn in range(rounds) for indices in each if turn < len(indices)]
    if not paths:
        raise UadxError("no held-out normal image to compare with FP32 on", "give data with the run's products: --data DATA")
    return paths[:count]


class Distance:
    """Relative L2 distance of two series of values, of which nothing but sums is kept.

    Args:
        ratio_scale: A value of 0 means no deviation at all. False takes the mean of each series off first: what shifts all
            values alike means nothing where zero is arbitrary, and thresholds take it up.
    """

    def __init__(self, ratio_scale: bool) -> None:
        self._ratio_scale = ratio_scale
        self._sums = np.zeros(5)

    def add(self, expected: NDArray[np.float64], found: NDArray[np.float64]) -> None:
        """Take in values of any shape, the same for both."""
        difference = found - expected
        self._sums += (expected.size, difference.sum(), (difference**2).sum(), expected.sum(), (expected**2).sum())

    def value(self) -> float:
        """Return the distance as a share of the expected values' own."""
        count, shift, difference, mean, total = self._sums
        if not np.isfinite(self._sums).all():
            return float("nan")
        if not self._ratio_scale:
            difference, total = difference - shift**2 / count, total - mean**2 / count
        return float(np.sqrt(max(difference, 0.0) / max(total, 1e-30)))


def compare(reference: Detector, candidate: Detector, paths: Sequence[str], *, ratio_scale: bool = True) -> Agreement:
    """Score the same images with two detectors and compare.

    Args:
        reference: What is right.
        candidate: What is judged.
        paths: Image files; those that cannot be read are left out.
        ratio_scale: A score of 0 means no deviation at all; see ``ModelPlugin``.

    Raises:
        UadxError: No image can be read.
    """
    scores: list[tuple[float, float]] = []
    ranks: list[float] = []
    of_maps, of_scores = Distance(ratio_scale), Distance(ratio_scale)
    for one, other in zip(reference.stream(paths, batch_size=4), candidate.stream(paths, batch_size=4), strict=True):
        if one.anomaly_map is None or other.anomaly_map is None:
            continue
        left, right = one.anomaly_map.astype(np.float64), other.anomaly_map.astype(np.float64)
        of_maps.add(left, right)
        ranks.append(rank_correlation(left.ravel(), right.ravel()))
        scores.append((one.score, other.score))
    if not scores:
        raise UadxError("no image to compare on can be read", "see 'uadx data check'")
    expected, found = np.array(scores).T
    of_scores.add(expected, found)
    return Agreement(
        images=len(scores),
        map_l2=of_maps.value(),
        map_rank=float(np.mean(ranks)),
        score_l2=of_scores.value(),
        score_rank=rank_correlation(expected, found) if len(scores) > 2 else None,
    )


def rank_correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation of two arrays ``(N,)``; ties keep their order. 0 where a value is not finite."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return 0.0
    first, second = (np.argsort(np.argsort(each, kind="stable"), kind="stable").astype(float) for each in (left, right))
    return float(np.corrcoef(first, second)[0, 1])
