"""How far a quantized model may be from FP32: what the referee measures, and what accuracy control guards."""

from dataclasses import replace

import nncf
import numpy as np
import onnx
import pytest
from networks import calibration
from runs import small_run

from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import Sample, SampleTable, hold_out
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.thresholds import thresholds_from_samples
from uad_plugins.hookspecs import QuantizationResult, QuantizerPlugin
from uad_plugins.quantization.export import save_onnx, to_onnx
from uad_plugins.quantization.quantize import Order, quantize
from uad_plugins.quantization.referee import Distance, Limits, compare, rank_correlation
from uad_plugins.quantized import Quantized
from uad_plugins.testing.common import registered


@pytest.fixture
def table(products):
    return hold_out(scan(products), 0.1, 0)


def test_accuracy_control_without_labels(small, tmp_path):
    """Layers may stay in float, and the result says how many."""
    options = {"max_drop": 0.001, "max_layers": 2}
    manifest = quantize(Order(small, tmp_path / "q", "openvino-int8", samples=6, options=options))
    assert manifest.details["guard"].startswith("rank correlation")
    placed = manifest.placement["model.xml"]
    assert placed["convolutions"] - placed["quantized"] == len(placed["in_float"])
    assert 0 <= manifest.details["drop"] <= 0.001


def test_accuracy_control_that_runs_out_of_layers_is_rejected(small, tmp_path, monkeypatch):
    """NNCF returns what it has by then, without a word."""
    ranked = []
    whole = nncf.quantize_with_accuracy_control

    def watched(*arguments, **options):
        ranked.append(
            (options["advanced_accuracy_restorer_parameters"].ranking_subset_size, len(list(arguments[2].get_data())))
        )
        return whole(*arguments, **options)

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", watched)
    options = {"max_drop": 1e-5, "max_layers": 1}
    with pytest.raises(UadxError) as error:
        quantize(Order(small, tmp_path / "q", "openvino-int8", samples=3, options=options))
    assert [asked for asked, _ in ranked] == [images for _, images in ranked] == [3]
    manifest = Quantized(tmp_path / "q").manifest()
    assert manifest.status == "rejected"
    drop = manifest.details["drop"]
    assert drop > 1e-5
    assert error.value.message == (
        f"the result is not good: a product loses {drop:.4f} of rank correlation of maps with FP32, by category, "
        "more than 1e-05"
    )
    assert error.value.hint.endswith("a higher --max-drop, more --set max_layers, --backend nncf-qat")


@pytest.mark.slow
def test_accuracy_control_goes_by_labelled_validation_images(products, tmp_path):
    """An index file marks them; the test split stays untouched."""
    lines = ["path,category,split,label,mask"]
    for sample in scan(products):
        split = "val" if sample.split == "test" else sample.split
        lines.append(f"{sample.path},{sample.category},{split},{'anomalous' if sample.label else 'normal'},{sample.mask}")
    (tmp_path / "index.csv").write_text("\n".join(lines))
    small_run(tmp_path / "index.csv", tmp_path / "run", {"model": {"layers": ["layer1"]}})
    options = {"max_drop": 0.3, "max_layers": 1}
    manifest = quantize(Order(tmp_path / "run", tmp_path / "q", "openvino-int8", samples=6, options=options))
    assert manifest.details["guard"] == "image AUROC of each category"
    assert manifest.details["drop"] <= 0.3


def test_accuracy_control_guards_each_category(table):
    from types import SimpleNamespace

    from uad_plugins.quantization.openvino_int8 import Guard

    samples = [Sample(s.path, s.category, s.label, "val" if s.split == "test" else s.split, s.mask, s.defect) for s in table]
    labelled = SampleTable(samples, table.root)
    data = calibration(labelled)
    seen = []

    def counts(image):
        # The first model that is asked is the one to compare with: right about every image.
        seen.append(image)
        return [np.array([float(labelled.labels[labelled.where(split="val")[len(seen) - 1]])]), np.zeros((1, 64, 64))]

    guard = Guard(SimpleNamespace(table=labelled, image_size=(64, 64), calibration=data), counts)
    assert guard.labelled
    assert guard.record["guard"] == "image AUROC of each category"
    truth = {id(image): label for image, label in zip(guard.images, guard._labels, strict=True)}
    category = dict(zip(map(id, guard.images), guard._names, strict=True))

    def perfect(image):
        return [np.array([float(truth[id(image)])]), np.zeros((1, 64, 64))]

    def blind_to_washers(image):
        return perfect(image) if category[id(image)] != "washer" else [np.array([0.0]), np.zeros((1, 64, 64))]

    assert guard.measure(perfect, guard.images) == (1.0, None)
    # Over all categories the AUROC is still good: the worst one decides.
    assert guard.measure(blind_to_washers, guard.images)[0] == pytest.approx(0.5)


@pytest.mark.parametrize(("backend", "status"), [("tensorrt-int8", "finished"), ("openvino-int8", "rejected")])
def test_a_graph_for_tensorrt_is_judged_node_by_node(backend, status, small, tmp_path, monkeypatch):
    """On a processor whose sums saturate OpenVINO is wrong about it; that is recorded, and says nothing about the device."""
    used = []

    def saturated(reference, candidate, paths, **options):
        agreement = compare(reference, candidate, paths, **options)
        return replace(agreement, map_l2=0.6) if "openvino" in (reference.engine, candidate.engine) else agreement

    def thresholds(detector, *arguments, **options):
        used.append(detector.engine)
        return thresholds_from_samples(detector, *arguments, **options)

    monkeypatch.setattr("uad_plugins.quantization.quantize.compare", saturated)
    monkeypatch.setattr("uad_plugins.quantization.quantize.thresholds_from_samples", thresholds)
    order = Order(small, tmp_path / "q", backend, samples=3)
    if status == "finished":
        quantize(order)
        assert used == ["onnxruntime"]
    else:
        with pytest.raises(UadxError, match="maps differ by 0.600"):
            quantize(order)
    manifest = Quantized(tmp_path / "q").manifest()
    assert manifest.status == status
    recorded = {name for name, values in manifest.agreement.items() if values["map_l2"] == 0.6}
    assert recorded == {name for name in manifest.agreement if "openvino" in name} != set()


def test_a_collapsed_result_is_rejected(small, tmp_path):
    """Its structure is right; the referee sees that the maps are not."""

    def collapses(request):
        model = to_onnx(request.core, request.image_size)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("student_model.feature_extractor.layer1.0.conv1.weight") or len(tensor.dims) == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
        save_onnx(model, request.folder / "model.onnx")
        return QuantizationResult(["model.onnx"], "fp32", "float")

    with (
        registered("quantizer", QuantizerPlugin("flat", "all weights are 0", collapses)),
        pytest.raises(UadxError, match="maps differ"),
    ):
        quantize(Order(small, tmp_path / "q", "flat", samples=3))


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    left, right = np.random.default_rng(0).random((2, 50))
    assert rank_correlation(left, right) == pytest.approx(spearmanr(left, right).statistic)
    assert rank_correlation(left, np.full(50, np.nan)) == 0.0


def test_agreement_is_judged_by_every_limit(small, products):
    with open_detector(small) as one, open_detector(small) as two:
        agreement = compare(one, two, list(scan(products).paths)[:3])
    assert agreement.map_l2 == 0
    assert agreement.map_rank == pytest.approx(1)
    assert agreement.wrong(Limits(0.1, 0.9, 0.1)) == []
    assert len(agreement.wrong(Limits(-1, 2, -1))) == 3


@pytest.mark.parametrize("ratio_scale", [True, False])
def test_a_common_shift_counts_only_where_zero_means_something(ratio_scale):
    expected = np.random.default_rng(0).normal(size=(3, 40))
    distance = Distance(ratio_scale)
    for row in expected:
        distance.add(row, 1.5 * row + 7)
    centred = expected - expected.mean()
    difference, total = (0.5 * expected + 7, expected) if ratio_scale else (0.5 * centred, centred)
    assert distance.value() == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(total))
    distance.add(expected[0], np.full(40, np.inf))
    assert np.isnan(distance.value())


def test_zscores_are_compared_without_their_common_shift(small, tmp_path, monkeypatch):
    seen = []

    def noted(*arguments, **options):
        seen.append(options.get("ratio_scale", True))
        return compare(*arguments, **options)

    monkeypatch.setattr("uad_plugins.quantization.quantize.compare", noted)
    monkeypatch.setattr("uad_plugins.quantization.quantize.ratio_scale", lambda _: False)
    quantize(Order(small, tmp_path / "q", "fp32"))
    # Against FP32; between engines a shift is a fault whatever it means.
    assert seen == [False] * 3 + [True] * 2
