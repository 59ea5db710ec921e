"""Decision thresholds: per category, and a pooled one for images whose category is not known. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from uad_plugins.artifacts import read_json
from uad_plugins.errors import UadxError, UsageError

if TYPE_CHECKING:
    from uad_plugins.data.samples import SampleTable
    from uad_plugins.detector import Detector, Prediction
    from uad_plugins.progress import Progress

NORMAL_FPR, BEST_F1 = "normal-fpr", "best-f1"
SCHEMA = "uadx.thresholds/1"


@dataclass(frozen=True)
class Threshold:
    """One threshold and what it was set from.

    Attributes:
        value: Scores above it are anomalous.
        how: ``quantile``: an order statistic of the normal scores; ``lognormal``, ``normal``: the upper prediction bound of
            such a distribution, where there are too few scores for the quantile; ``largest``: of one or two scores, which
            promise nothing; ``f1``: best F1 on labelled scores.
        normal: Normal images it was set from.
        anomalous: Anomalous images it was set from.
    """

    value: float
    how: str
    normal: int
    anomalous: int = 0


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of a model.

    Attributes:
        pooled: For images whose category is not known; see ``bounded``.
        categories: By category.
        method: ``normal-fpr`` or ``best-f1``.
        target_fpr: Share of good parts that may be rejected; None with ``best-f1``.
        source: Which images, in words.
    """

    pooled: Threshold
    categories: dict[str, Threshold] = field(default_factory=dict)
    method: str = NORMAL_FPR
    target_fpr: float | None = 0.01
    source: str = ""

    def of(self, category: str | None) -> float:
        """Return the threshold of a category; the pooled one for None or a category that has none."""
        return self.categories.get(category or "", self.pooled).value

    def over(self, before: Thresholds, categories: Sequence[str]) -> tuple[Thresholds, list[str]]:
        """Return these thresholds, with earlier ones for what was not measured this time.

        The pooled one is for an image of any category: where one is missing the earlier one stays.

        Args:
            before: The earlier ones.
            categories: All that the model knows.

        Returns:
            The thresholds, and the names of those kept.
        """
        kept = {name: threshold for name, threshold in before.categories.items() if name not in self.categories}
        whole = not math.isfinite(before.pooled.value) or all(name in self.categories for name in [*kept, *categories])
        names = [*sorted(kept), *([] if whole else ["pooled"])]
        if not names:
            return self, []
        merged = replace(
            self,
            pooled=self.pooled if whole else before.pooled,
            categories=dict(sorted({**kept, **self.categories}.items())),
            source=f"{self.source}; kept as they were: {', '.join(names)}",
        )
        return merged, names

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Thresholds:
        """Read the file of a station; ``NO_THRESHOLDS`` where it has none: images get a score and no verdict.

        Raises:
            UadxError: It is damaged.
        """
        if not path.exists():
            return NO_THRESHOLDS
        try:
            return cls.from_dict(read_json(path))
        except UadxError as error:
            raise UadxError(f"{path}: damaged: {error.message}", "remove it, and set them anew: uadx thresholds") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Thresholds:
        """Read what ``as_dict`` wrote.

        Raises:
            UadxError: It is something else.
        """
        try:
            if content["schema"] != SCHEMA:
                raise KeyError("schema")
            return cls(
                pooled=Threshold(**content["pooled"]),
                categories={name: Threshold(**value) for name, value in content["categories"].items()},
                method=content["method"],
                target_fpr=content["target_fpr"],
                source=content["source"],
            )
        except (KeyError, TypeError) as error:
            raise UadxError(
                f"thresholds are damaged or of another version: {error}", "set them anew: uadx thresholds"
            ) from error


NO_THRESHOLDS = Thresholds(Threshold(math.inf, "none", 0), source="not set")
"""Before any were set: nothing is anomalous."""

PRIOR_FREEDOM = 8
"""Weight, in degrees of freedom, of the spread common to all categories where one has few scores of its own."""


def from_normal(
    scores: NDArray[np.floating], target_fpr: float, common: float | None = None, ratio_scale: bool = True
) -> Threshold:
    """Set a threshold from the scores of normal images alone.

    With at least ``1 / target_fpr - 1`` scores it is the order statistic that a new normal image exceeds with a probability
    of at most ``target_fpr`` (split-conformal prediction). With fewer no order statistic can promise that; then the scores
    are taken as log-normal and the threshold is the upper bound of their prediction interval. Scores whose zero is
    arbitrary, such as z-scores, are taken as normal: shifted by a constant they get a threshold shifted by it, while their
    logarithms would be anything. The spread of few scores is itself uncertain, so it is moderated by the spread that the
    categories have in common.

    Args:
        scores: ``(N,)``, finite.
        target_fpr: 0..1 exclusive.
        common: What ``common_spread`` returns for all categories; None: not known.
        ratio_scale: A score of 0 means no deviation at all. Scores of 0 and below belie it.

    Raises:
        UadxError: There is no score.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    count = len(ordered)
    if count == 0:
        raise UadxError("no normal image to set a threshold from", "hold images of good parts out from training")
    rank = math.ceil((count + 1) * (1 - target_fpr))
    if rank <= count:
        return Threshold(float(ordered[rank - 1]), "quantile", count)
    freedom = count - 1 + (PRIOR_FREEDOM if common is not None else 0)
    if freedom < 2:
        return Threshold(float(ordered[-1]), "largest", count)
    ratio_scale = ratio_scale and bool(ordered[0] > 0)
    values = np.log(ordered) if ratio_scale else ordered
    squares = float(((values - values.mean()) ** 2).sum()) + (PRIOR_FREEDOM * common**2 if common is not None else 0)
    spread = math.sqrt(squares / freedom * (1 + 1 / count))
    bound = float(values.mean()) + student_quantile(1 - target_fpr, freedom) * spread
    bound = math.exp(bound) if ratio_scale else bound
    return Threshold(max(bound, float(ordered[-1])), "lognormal" if ratio_scale else "normal", count)


def common_spread(scores: NDArray[np.floating], categories: NDArray[np.str_], ratio_scale: bool = True) -> float | None:
    """Return the standard deviation of (log) scores within categories; None without two categories of two scores.

    Args:
        scores: ``(N,)``; positive where on a ratio scale.
        categories: ``(N,)``.
        ratio_scale: Take logarithms.
    """
    values = np.log(scores) if ratio_scale else scores
    squares, freedom, used = 0.0, 0, 0
    for name in np.unique(categories):
        mine = values[categories == name]
        if len(mine) >= 2:
            squares += float(((mine - mine.mean()) ** 2).sum())
            freedom += len(mine) - 1
            used += 1
    return math.sqrt(squares / freedom) if used >= 2 else None


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t: expansion of Cornish and Fisher, exact to 1 % from 4 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    n = float(freedom)
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
    )
    return z + sum(terms)


def bounded(pooled: Threshold, own: Iterable[Threshold]) -> Threshold:
    """Return the pooled threshold, at most the largest of the categories'.

    Few scores of categories of unlike scale are no sample of one (log-)normal distribution: its spread would be that between
    the categories, and the bound far above all of them. But what no category exceeds more often than it may, no mixture of
    them does: the largest of the categories' thresholds keeps the rate as well as it does for its own, whatever share of the
    images each has, and an image is not judged more leniently for not naming its category. It is not below any score; with
    enough scores for an order statistic there is nothing to bound.

    Args:
        pooled: Set from the scores of all categories.
        own: Of each category.
    """
    largest = max(own, key=lambda threshold: threshold.value, default=pooled)
    if pooled.how not in ("lognormal", "normal") or pooled.value <= largest.value:
        return pooled
    return replace(pooled, value=largest.value, how=largest.how)


def best_f1(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> Threshold:
    """Set the threshold with the best F1 on labelled scores: midway between the scores on its two sides.

    Args:
        scores: ``(N,)``.
        labels: ``(N,)``, 1 for anomalous.

    Raises:
        UadxError: There is no anomalous, or no normal image.
    """
    positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
    if positives == 0 or negatives == 0:
        raise UadxError("best F1 needs normal and anomalous images", "use --method normal-fpr")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    hits = np.cumsum(labels[order] == 1)
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + positives)
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)
    best = int(np.argmax(np.where(last_of_tie, f1, -1)))
    lowest = float(ranked[best])
    # Where all are called anomalous there is none below: the lowest must exceed the threshold too.
    below = float(ranked[best + 1]) if best + 1 < len(ranked) else lowest - 1e-4 * max(abs(lowest), 1e-6)
    middle = (lowest + below) / 2
    return Threshold(middle if middle < lowest else below, "f1", negatives, positives)


def check_request(method: str, target_fpr: float | None) -> None:
    """Refuse a method or a rate that makes no sense; None is no rate.

    Raises:
        UsageError: See above.
    """
    if method not in {NORMAL_FPR, BEST_F1}:
        raise UsageError(f"unknown threshold method '{method}'", f"use {NORMAL_FPR} or {BEST_F1}")
    if target_fpr is not None and not 0 < target_fpr < 1:
        raise UsageError(f"a false-positive rate of {target_fpr} makes no sense", "it is a share: above 0, below 1")


def set_thresholds(
    scores: NDArray[np.floating],
    labels: NDArray[np.integer],
    categories: Sequence[str],
    *,
    method: str = NORMAL_FPR,
    target_fpr: float = 0.01,
    source: str,
    ratio_scale: bool = True,
) -> Thresholds:
    """Set the thresholds of every category and the pooled one.

    Args:
        scores: ``(N,)``; images that could not be read (NaN) are left out.
        labels: ``(N,)``, 1 for anomalous; ``normal-fpr`` looks at the normal ones alone.
        categories: Category of each image.
        method: ``normal-fpr`` or ``best-f1``.
        target_fpr: For ``normal-fpr``.
        source: Which images these are, in words; written down with the thresholds.
        ratio_scale: See ``from_normal``.

    Raises:
        UadxError: There is nothing to set a threshold from.
        UsageError: Unknown method.
    """
    check_request(method, target_fpr)
    names = np.asarray(categories, dtype=np.str_)
    usable = np.isfinite(scores)
    normal = usable & (labels == 0)
    # One scale for all: what the categories have in common is measured on it.
    ratio_scale = ratio_scale and bool((scores[normal] > 0).all())
    spread = common_spread(scores[normal], names[normal], ratio_scale) if method == NORMAL_FPR else None

    def one(chosen: NDArray[np.bool_], common: float | None) -> Threshold:
        if method == BEST_F1:
            return best_f1(scores[chosen], labels[chosen])
        return from_normal(scores[chosen & normal], target_fpr, common, ratio_scale)

    def has_own(name: str) -> bool:
        mine = usable & (names == name)
        return bool((mine & normal).any()) and (method == NORMAL_FPR or bool((mine & (labels == 1)).any()))

    wanted = [name for name in sorted(set(categories)) if has_own(name)]
    own = {name: one(usable & (names == name), spread) for name in wanted}
    pooled = one(usable, None)
    return Thresholds(
        pooled=bounded(pooled, own.values()) if method == NORMAL_FPR else pooled,
        categories=own,
        method=method,
        target_fpr=target_fpr if method == NORMAL_FPR else None,
        source=source,
    )


def thresholds_from_samples(
    detector: Detector,
    table: SampleTable,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    method: str,
    target_fpr: float,
    kind: str,
    ratio_scale: bool = True,
    progress: Progress | None = None,
    unreadable: Callable[[Prediction], None] | None = None,
) -> Thresholds:
    """Score samples and set thresholds from them.

    Args:
        detector: Scores the images.
        table: Holds the samples.
        indices: Which of them to use; ``normal-fpr`` takes the normal ones.
        method: See ``set_thresholds``.
        target_fpr: See ``set_thresholds``.
        kind: Which images these are, in words.
        ratio_scale: See ``from_normal``.
        progress: Called with images done and images in all.
        unreadable: Called with the prediction of each image that could not be scored: the others count.

    Raises:
        UadxError: No image is left to set them from.
        UsageError: See ``check_request``.
    """
    check_request(method, target_fpr)
    used = [int(i) for i in indices if method == BEST_F1 or table.labels[int(i)] == 0]
    scores = np.empty(len(used))
    categories = [table.categories[int(table.category_index[i])] for i in used]
    failure = ""
    for done, prediction in enumerate(detector.stream((table.paths[i] for i in used), categories=categories)):
        scores[done] = prediction.score
        if prediction.failure:
            failure = failure or f"{prediction.path}: {prediction.failure}"
            if unreadable is not None:
                unreadable(prediction)
        if progress is not None:
            progress(done + 1, len(used))
    if failure and not np.isfinite(scores).any():
        raise UadxError(f"no image to set a threshold from can be read: {failure}", "repair them, or give others")
    return set_thresholds(
        scores,
        table.labels[used].astype(int),
        categories,
        method=method,
        target_fpr=target_fpr,
        ratio_scale=ratio_scale,
        source=f"{int(np.isfinite(scores).sum())} {'labelled' if method == BEST_F1 else 'normal'} images {kind}",
    )
