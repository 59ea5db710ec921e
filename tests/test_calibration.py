"""Calibration data: balanced, seeded, recorded; noise that means the same with and without normalisation in the graph."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from networks import MEAN, STD, calibration, core, noise
from networks import module as module_of
from nncf.torch.function_hook.hook_storage import decode_hook_name

from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import hold_out
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.hookspecs import QuantizationRequest
from uad_plugins.quantization import torch_quantization
from uad_plugins.quantization.calibration import SOURCES, calibrate
from uad_plugins.quantization.export import save_onnx, to_onnx, to_openvino
from uad_plugins.quantization.quiet import quiet_quantizers
from uad_plugins.quantization.torch_quantization import hooks, quantize_core
from uad_plugins.registry import registry


@pytest.fixture
def table(products):
    return hold_out(scan(products), 0.1, 0)


def test_calibration_images_are_balanced_and_never_test_or_held_out(table):
    chosen = calibration(table, samples=12)
    rows = {sample.path: sample for sample in table}
    assert {rows[path].split for path in chosen.paths} == {"train"}
    assert {rows[path].label for path in chosen.paths} == {0}
    assert chosen.record["images"] == dict.fromkeys(table.categories, 4)
    assert chosen.paths == calibration(table, samples=12).paths
    assert chosen.paths != calibration(table, samples=12, seed=1).paths
    assert chosen.record["images_sha256"] != calibration(table, samples=12, seed=1).record["images_sha256"]


def test_too_few_images_are_all_used_and_recorded(table):
    chosen = calibration(table, samples=1000)
    assert len(chosen) == chosen.record["samples"] == len(table.where(split="train", label=0))
    assert chosen.record["asked"] == 1000


def test_a_missing_category_is_named(table):
    with pytest.raises(UadxError, match="no normal training image of gear"):
        calibrate("dataset", 9, table, [*table.categories, "gear"], image_size=(64, 64), mean=MEAN, std=STD)
    noisy = calibrate("random-normal", 9, table, [*table.categories, "gear"], image_size=(64, 64), mean=MEAN, std=STD)
    assert len(noisy) == 9


def test_an_unreadable_image_is_left_out(products, tmp_path):
    data = shutil.copytree(products, tmp_path / "data")
    table = hold_out(scan(data), 0.1, 0)
    broken = calibration(table, samples=3).paths[0]
    Path(broken).write_bytes(b"not an image")
    chosen = calibration(table, samples=3)
    assert broken not in chosen.paths
    assert chosen.record["skipped"] == [broken]
    assert len(chosen) == 3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_samples_are_made_anew_and_alike(table, source, size):
    chosen = calibration(table, source, samples=8, size=size)
    assert len(chosen) == 8
    first, again = [chosen[i] for i in range(8)], list(chosen)
    assert all(item.shape == (1, 3, *size) and item.dtype == np.float32 for item in first)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(IndexError):
        chosen[8]


def test_noise_is_standard_normal(table):
    values = np.concatenate([item.ravel() for item in calibration(table, "random-normal", samples=20)])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_noise_may_reach_further(table):
    plain, wide = (calibration(table, "random-normal", samples=4, **options) for options in ({}, {"noise_std": 3.0}))
    assert (plain.record["noise_std"], wide.record["noise_std"]) == (1.0, 3.0)
    assert all(np.allclose(3 * one, other, rtol=1e-6) for one, other in zip(plain, wide, strict=True))
    mixed = calibration(table, "mixed", samples=6, noise_std=3.0)
    assert np.array_equal(mixed[1], wide[0]) and np.array_equal(mixed[0], calibration(table, "mixed", samples=6)[0])
    assert calibration(table, "dataset", samples=4).record["noise_std"] is None


@pytest.mark.parametrize(
    ("source", "deviation", "message"),
    [
        ("random-normal", 0.0, "--noise-std 0 makes no sense"),
        ("mixed", float("nan"), "--noise-std nan makes no sense"),
        ("random-normal", float("inf"), "--noise-std inf makes no sense"),
        ("dataset", 2.0, "--calibration dataset has none"),
    ],
)
def test_a_deviation_that_is_none_is_refused(table, source, deviation, message):
    with pytest.raises(UsageError, match=message):
        calibration(table, source, samples=4, noise_std=deviation)


def test_noise_means_the_same_with_the_normalisation_in_the_graph(table, tmp_path):
    """Ranges of all shared quantizers are equal; feeding noise as if it were an image would give others."""
    import nncf
    import openvino
    from openvino.preprocess import PrePostProcessor

    with quiet_quantizers():
        path = save_onnx(to_onnx(core("stfpm"), (64, 64)), tmp_path / "model.onnx")
        bare = to_openvino(path)
        steps = PrePostProcessor(to_openvino(path))
        steps.input().preprocess().mean([m for m in MEAN]).scale([s for s in STD])
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        whole = steps.build()
        chosen = calibration(table, "random-normal", samples=4)
        std, mean = (np.reshape(np.float32(value), (1, 3, 1, 1)) for value in (STD, MEAN))
        ranges = []
        for model, items in (
            (bare, list(chosen)),
            # Noise leaves 0..1 there, and must: clipped, or rounded to 8 bits, it would be other data.
            (whole, [np.float32(item * std + mean) for item in chosen]),
            (whole, list(chosen)),
        ):
            found = nncf.quantize(model, nncf.Dataset(items), subset_size=4)
            ranges.append(
                {
                    node.get_friendly_name(): float(node.input_value(2).get_node().data.max())
                    for node in found.get_ops()
                    if node.get_type_name() == "FakeQuantize" and node.input_value(2).get_node().data.size == 1
                }
            )
    shared = sorted(set(ranges[0]) & set(ranges[1]) & set(ranges[2]))
    assert len(shared) > 20
    expected, same, other = ([each[name] for name in shared] for each in ranges)
    np.testing.assert_allclose(same, expected, rtol=1e-4)
    assert not np.allclose(other, expected, rtol=1e-2)


def range_of_the_image(profile, ranges):
    """One pixel of one of four images is far beyond all others."""
    images = noise(4)
    images[2][0, 0, 20, 20] = 1000.0
    with quiet_quantizers():
        model = quantize_core(core("stfpm"), images, profile=profile, overflow_fix="disable", ranges=ranges)
    (quantizer,) = (hook for name, hook in hooks(model) if decode_hook_name(name)[1] == "images")
    return float(quantizer.scale)


@pytest.mark.parametrize(("profile", "quantile"), [("openvino", 3.8), ("tensorrt", 3.15)])
def test_ranges_hold_an_outlier_or_leave_it_out(profile, quantile):
    found = {ranges: range_of_the_image(profile, ranges) for ranges in ("whole", "quantile", "mean")}
    assert found["whole"] == pytest.approx(1000, rel=1e-3)
    # The mean of three ranges of noise and that of the outlier.
    assert 200 < found["mean"] < 300
    # As many standard deviations as a ten thousandth, or a thousandth, of all noise lies beyond.
    assert found["quantile"] == pytest.approx(quantile, rel=0.05)


@pytest.mark.parametrize(
    ("source", "expected"), [("dataset", "quantile"), ("mixed", "quantile"), ("random-normal", "whole")]
)
@pytest.mark.parametrize("backend", ["openvino-int8", "tensorrt-int8", "nncf-qat"])
def test_noise_keeps_all_of_its_range_and_equalizes_nothing(table, backend, source, expected, monkeypatch, tmp_path):
    """It reaches less far than images do, and drives other channels."""

    class Enough(Exception):
        pass

    def seen(*arguments, **options):
        ranges.append(arguments[0] if backend == "openvino-int8" else options["ranges"])
        raise Enough

    ranges, equalized = [], []
    module = importlib.import_module(f"uad_plugins.quantization.{backend.replace('-', '_')}")
    home = module if backend == "openvino-int8" else torch_quantization
    monkeypatch.setattr(home, "advanced_parameters" if backend == "openvino-int8" else "quantize_core", seen)
    monkeypatch.setattr(home, "equalize", lambda core, images: equalized.append(len(list(images))))
    chosen = calibration(table, source, samples=6)
    for options in ({}, {"ranges": "mean", "equalize": False}):
        request = QuantizationRequest(
            run=None,
            config=None,
            module=module_of("stfpm"),
            core=core("stfpm"),
            image_size=(64, 64),
            calibration=chosen,
            table=table,
            options=registry().get("quantizer", backend).options(**options),
            folder=tmp_path,
        )
        with pytest.raises(Enough):
            module.quantize(request)
    assert ranges == [expected, "mean"]
    assert equalized == ([] if source == "random-normal" else [6])
