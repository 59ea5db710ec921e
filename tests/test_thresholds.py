"""Decision thresholds."""

import math

import numpy as np
import pytest
from scipy import stats

from uad_plugins.errors import UadxError, UsageError
from uad_plugins.evaluation.thresholds import (
    Threshold,
    Thresholds,
    best_f1,
    common_spread,
    from_normal,
    set_thresholds,
    student_quantile,
)


@pytest.mark.parametrize(("count", "rank"), [(99, 99), (199, 198), (1000, 991)])
def test_enough_scores_give_the_conformal_order_statistic(count, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert from_normal(scores, 0.01) == Threshold(float(rank), "quantile", count)


def test_the_promised_rate_holds_on_fresh_scores():
    rng = np.random.default_rng(1)
    rates = [float((rng.lognormal(size=2000) > from_normal(rng.lognormal(size=150), 0.05).value).mean()) for _ in range(200)]
    assert 0.035 < np.mean(rates) < 0.051


def test_few_scores_give_the_bound_of_a_log_normal_prediction_interval():
    logs = np.array([0.1, 0.4, 0.2, 0.9, 0.5])
    found = from_normal(np.exp(logs), 0.01)
    expected = math.exp(logs.mean() + stats.t.ppf(0.99, 4) * logs.std(ddof=1) * math.sqrt(1 + 1 / 5))
    assert found.how == "lognormal"
    assert found.value == pytest.approx(expected, rel=2e-3)


def test_few_scores_of_log_normal_parts_keep_the_rate():
    rng = np.random.default_rng(2)
    rates = [stats.lognorm.sf(from_normal(rng.lognormal(size=12), 0.01).value, 1) for _ in range(3000)]
    assert np.mean(rates) == pytest.approx(0.01, abs=0.003)


def test_a_common_spread_tames_an_outlier():
    tight = np.exp(np.random.default_rng(3).normal(0, 0.2, (4, 8)))
    outlier = np.append(np.exp(np.random.default_rng(4).normal(0, 0.2, 7)), 30.0)
    names = np.repeat(np.array(["a", "b", "c", "d"]), 8)
    spread = common_spread(tight.ravel(), names)
    assert spread == pytest.approx(0.2, abs=0.06)
    assert from_normal(outlier, 0.01, spread).value < from_normal(outlier, 0.01).value
    assert from_normal(outlier, 0.01, spread).value >= 30.0


Z_SCORES = np.array([0.02, 0.4, 0.7, 0.9, 1.1, 1.3, 1.6, 2.2])


def test_scores_with_an_arbitrary_zero_give_the_bound_of_a_normal_prediction_interval():
    expected = Z_SCORES.mean() + stats.t.ppf(0.99, 7) * Z_SCORES.std(ddof=1) * math.sqrt(1 + 1 / 8)
    found = from_normal(Z_SCORES, 0.01, ratio_scale=False)
    assert found.how == "normal"
    assert found.value == pytest.approx(expected, rel=2e-3)
    assert found.value < 4 < 17 < from_normal(Z_SCORES, 0.01).value
    # Where their zero lies makes no difference; scores below it cannot have a ratio.
    assert from_normal(Z_SCORES - 1, 0.01).value == pytest.approx(found.value - 1)
    # Moderated like the other.
    assert from_normal(Z_SCORES, 0.01, 0.1, ratio_scale=False).value < found.value


def test_few_scores_of_normal_parts_keep_the_rate_whatever_their_zero():
    rng = np.random.default_rng(5)
    rates = [stats.norm.sf(from_normal(rng.normal(size=12), 0.01, ratio_scale=False).value) for _ in range(3000)]
    assert np.mean(rates) == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize("ratio_scale", [True, False])
def test_categories_share_the_scale_on_which_their_spread_is_common(ratio_scale):
    scores = np.concatenate([Z_SCORES - 1, Z_SCORES + 3])
    names = ["a"] * 8 + ["b"] * 8
    found = set_thresholds(scores, np.zeros(16, int), names, source="", ratio_scale=ratio_scale)
    assert {threshold.how for threshold in found.categories.values()} == {"normal"}
    assert found.categories["b"].value - found.categories["a"].value == pytest.approx(4)


@pytest.mark.parametrize("scores", [[1.0, 2.0], [-1.0, 2.0], [2.0]])
def test_too_few_scores_for_a_spread_give_their_maximum(scores):
    assert from_normal(np.array(scores), 0.01) == Threshold(2.0, "largest", len(scores))


def test_no_score_is_an_error():
    with pytest.raises(UadxError, match="no normal image"):
        from_normal(np.array([]), 0.01)


@pytest.mark.parametrize("freedom", [4, 9, 30])
@pytest.mark.parametrize("probability", [0.9, 0.95, 0.99])
def test_the_quantile_of_students_t(probability, freedom):
    assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=2e-3)


def test_best_f1_lies_between_the_scores_on_its_two_sides():
    found = best_f1(np.array([0.1, 0.2, 0.3, 0.6, 0.8]), np.array([0, 0, 0, 1, 1]))
    assert found == Threshold(pytest.approx(0.45), "f1", 3, 2)


def test_best_f1_takes_ties_whole():
    scores, labels = np.array([0.5, 0.5, 0.5, 0.1]), np.array([1, 0, 1, 0])
    assert best_f1(scores, labels).value == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([0.5, 0.6, 0.7], [1, 0, 1]),
        ([0.0, 0.0, 3.0], [1, 0, 1]),
        ([-2.0, -1.0, -0.5], [1, 1, 0]),
        ([1.0, float(np.nextafter(1.0, 2.0)), 2.0], [0, 1, 1]),
    ],
)
def test_best_f1_rejects_what_it_counted_as_rejected(scores, labels):
    scores, labels = np.array(scores), np.array(labels)
    called = scores > best_f1(scores, labels).value
    f1 = [2 * labels[scores >= t].sum() / (labels.sum() + (scores >= t).sum()) for t in scores]
    assert 2 * labels[called].sum() / (labels.sum() + called.sum()) == max(f1)


def test_best_f1_needs_both_classes():
    with pytest.raises(UadxError, match="normal and anomalous"):
        best_f1(np.array([0.5]), np.array([0]))


def test_thresholds_are_set_for_each_category_and_pooled():
    scores = np.array([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, np.nan, 99.0])
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    found = set_thresholds(scores, labels, ["a"] * 3 + ["b"] * 4 + ["c"], target_fpr=0.4, source="here")
    assert {name: (t.value, t.normal) for name, t in found.categories.items()} == {"a": (3.0, 3), "b": (30.0, 3)}
    assert found.pooled == Threshold(20.0, "quantile", 6)
    assert (found.of("a"), found.of("c"), found.of(None)) == (3.0, 20.0, 20.0)
    assert (found.method, found.target_fpr, found.source) == ("normal-fpr", 0.4, "here")


def test_few_scores_of_unlike_scale_pool_to_no_more_than_the_largest_category():
    found = set_thresholds(np.array([1, 1.1, 10.0]), np.zeros(3, int), ["a", "a", "b"], source="x")
    assert found.pooled == Threshold(10.0, "largest", 3)
    rng = np.random.default_rng(5)
    scores = np.concatenate([rng.lognormal(0, 0.2, 8), rng.lognormal(5, 0.2, 8)])
    found = set_thresholds(scores, np.zeros(16, int), ["a"] * 8 + ["b"] * 8, source="x")
    assert found.pooled == Threshold(found.categories["b"].value, "lognormal", 16)
    assert found.pooled.value >= scores.max()


def test_the_pooled_threshold_of_zscores_is_bounded_too():
    rng = np.random.default_rng(5)
    scores = np.concatenate([rng.normal(0, 0.2, 8), rng.normal(50, 0.2, 8)])
    names = np.repeat(np.array(["a", "b"]), 8)
    found = set_thresholds(scores, np.zeros(16, int), names, source="x", ratio_scale=False)
    assert found.pooled == Threshold(found.categories["b"].value, "normal", 16)


def test_few_scores_of_one_scale_keep_the_rate_pooled():
    rng = np.random.default_rng(6)
    names = ["a"] * 6 + ["b"] * 6
    pooled = [set_thresholds(rng.lognormal(size=12), np.zeros(12, int), names, source="x").pooled for _ in range(1000)]
    assert np.mean([stats.lognorm.sf(threshold.value, 1) for threshold in pooled]) == pytest.approx(0.01, abs=0.004)


def test_what_was_not_measured_keeps_its_threshold():
    def ones(*names, source="new"):
        return set_thresholds(np.ones(len(names)), np.zeros(len(names), int), names, source=source)

    before = set_thresholds(np.array([5.0, 6.0, 7.0]), np.zeros(3, int), ["a", "b", "c"], source="old")
    found, kept = ones("b").over(before, ["a", "b", "c"])
    assert {name: found.of(name) for name in ("a", "b", "c", None)} == {"a": 5.0, "b": 1.0, "c": 7.0, None: before.of(None)}
    assert kept == ["a", "c", "pooled"]
    assert found.source == "new; kept as they were: a, c, pooled"
    whole = ones("a", "b", "c", "d")
    assert whole.over(before, ["a", "b", "c"]) == (whole, [])


def test_they_survive_being_written_down():
    found = set_thresholds(np.arange(1.0, 200), np.zeros(199, int), ["a"] * 199, source="x")
    assert Thresholds.from_dict(found.as_dict()) == found


@pytest.mark.parametrize("content", [{}, {"schema": "uadx.thresholds/9"}, {"schema": "uadx.thresholds/1", "pooled": {}}])
def test_damaged_thresholds_are_refused(content):
    with pytest.raises(UadxError, match="damaged or of another version"):
        Thresholds.from_dict(content)


@pytest.mark.parametrize("options", [{"method": "guess"}, {"target_fpr": 0.0}, {"target_fpr": 1.5}])
def test_senseless_requests_are_refused(options):
    with pytest.raises(UsageError):
        set_thresholds(np.ones(3), np.zeros(3, int), ["a"] * 3, source="x", **options)


def test_one_image_of_a_category_takes_the_spread_that_is_common_to_all():
    """And its largest score only where there is none: as docs/training.md has it."""
    scores, labels = np.array([1.0, 1.5, 1.2, 1.1, 2.0]), np.zeros(5, dtype=int)
    alone = set_thresholds(scores[2:], labels[2:], ["b", "b", "c"], source="x").categories
    assert (alone["b"].value, alone["c"].value, alone["c"].how) == (1.2, 2.0, "largest")
    among = set_thresholds(scores, labels, ["a", "a", "b", "b", "c"], source="x").categories
    assert (among["b"].how, among["c"].how) == ("lognormal", "lognormal")
    assert among["b"].value > 1.2
    assert among["c"].value > 2.0
