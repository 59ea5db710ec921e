"""Metrics against the exact ones of scikit-learn and anomalib."""

import numpy as np
import pytest
import torch
from anomalib.metrics.aupro import _AUPRO
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from uad_plugins.evaluation.metrics import METRICS, CategoryMetrics, PixelCurves, image_metrics, mean_over


def maps_and_masks(seed=0, count=6, side=48, scale=1.0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, side, side), bool)
    for mask in masks[: count // 2]:
        for _ in range(3):
            y, x = rng.integers(0, side - 10, 2)
            mask[y : y + rng.integers(3, 10), x : x + rng.integers(3, 10)] = True
    maps = (rng.lognormal(size=masks.shape) * (1 + 1.5 * masks) * scale).astype(np.float32)
    return maps, masks


def curves(maps, masks):
    metric = PixelCurves()
    for one_map, mask in zip(maps, masks, strict=True):
        metric.update(torch.from_numpy(one_map)[None], torch.from_numpy(mask)[None])
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_pixel_metrics_agree_with_the_exact_ones(scale):
    maps, masks = maps_and_masks(scale=scale)
    found = curves(maps, masks)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=2e-4)
    exact = _AUPRO(fpr_limit=0.3)
    exact.update(torch.from_numpy(maps), torch.from_numpy(masks.astype(np.int64)))
    assert found["aupro"] == pytest.approx(float(exact.compute()), abs=1e-3)


def test_negative_values_keep_their_order():
    maps, masks = maps_and_masks()
    assert curves(np.log(maps), masks) == pytest.approx(curves(maps, masks), abs=1e-3)


def test_a_perfect_map_scores_one_and_its_opposite_zero():
    _, masks = maps_and_masks()
    assert curves(masks.astype(np.float32), masks) == pytest.approx({"pixel_auroc": 1.0, "aupro": 1.0})
    assert curves(1 - masks.astype(np.float32), masks)["pixel_auroc"] == 0.0


def test_a_constant_map_ranks_nothing():
    _, masks = maps_and_masks()
    assert curves(np.ones(masks.shape, np.float32), masks)["pixel_auroc"] == pytest.approx(0.5)


def test_pixel_metrics_are_undefined_without_defects():
    maps, masks = maps_and_masks()
    assert all(np.isnan(value) for value in curves(maps, np.zeros_like(masks)).values())


def test_the_state_does_not_grow_with_the_pixels():
    metric = PixelCurves()
    maps, masks = maps_and_masks()
    before = sum(getattr(metric, name).nbytes for name in metric._defaults)
    for _ in range(3):
        metric.update(torch.from_numpy(maps), torch.from_numpy(masks))
    assert sum(getattr(metric, name).nbytes for name in metric._defaults) == before


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_image_metrics_agree_with_scikit_learn(shift):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 200)
    scores = rng.normal(labels * 0.8, 1) + shift
    found = image_metrics(scores, labels)
    assert found["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert found["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    best = max(f1_score(labels, scores >= threshold) for threshold in scores)
    assert found["image_f1_max"] == pytest.approx(best, abs=1e-6)


def test_image_metrics_are_undefined_with_one_class():
    expected = {"image_auroc": None, "image_ap": None, "image_f1_max": None}
    assert image_metrics(np.array([0.1, 0.2]), np.array([0, 0])) == expected


def test_the_report_has_each_category_their_mean_and_all_pooled():
    maps, masks = maps_and_masks()
    metrics = CategoryMetrics()
    for index in range(6):
        label = int(masks[index].any())
        metrics.add("masked", label, float(label) + index / 100, maps[index], masks[index])
        metrics.add("unmasked", label, float(index), None, None)
        metrics.add("good only", 0, float(index), None, None)
    report = metrics.report()
    assert set(report) == {"categories", "mean", "pooled"}
    assert list(report["categories"]) == ["good only", "masked", "unmasked"]
    masked, unmasked = report["categories"]["masked"], report["categories"]["unmasked"]
    assert set(masked) == {*METRICS, "normal", "anomalous"}
    assert (masked["image_auroc"], masked["normal"], masked["anomalous"]) == (1.0, 3, 3)
    assert unmasked["image_auroc"] == 0.0
    assert (unmasked["pixel_auroc"], unmasked["aupro"]) == (None, None)
    assert report["mean"]["image_auroc"] == 0.5
    assert report["mean"]["pixel_auroc"] == masked["pixel_auroc"]
    assert (report["pooled"]["normal"], report["pooled"]["anomalous"]) == (12, 6)
    assert report["pooled"]["pixel_auroc"] == pytest.approx(masked["pixel_auroc"])


def test_the_mean_skips_what_is_undefined():
    rows = {"a": dict.fromkeys(METRICS, 1.0), "b": {**dict.fromkeys(METRICS), "image_auroc": 0.5}}
    assert mean_over(rows) == {**dict.fromkeys(METRICS, 1.0), "image_auroc": 0.75}
