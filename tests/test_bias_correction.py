"""Sequential bias correction gives the convolutions of a Q/DQ graph the channel means of the float graph."""

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import METHODS, exported, noise
from onnx import ModelProto

from uad_plugins.errors import UadxError
from uad_plugins.quantization import tensorrt_rules
from uad_plugins.quantization.bias_correction import correct_biases
from uad_plugins.quantization.onnx_graph import OnnxGraph

IMAGES = [image.numpy() for image in noise(6, seed=5)]


def means(model, count=None):
    """The channel means of what each convolution (with the normalization behind it) gives, in the order of execution."""
    graph = OnnxGraph.of(model)
    convolutions = graph.convolutions()
    names = [name for name in graph.nodes if name in convolutions][:count]
    names = [
        after[0] if len(after := graph.outputs[name]) == 1 and graph.kinds[after[0]] == "norm" else name for name in names
    ]
    extended = ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(extended.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [session.run(names, {"images": image}) for image in IMAGES]
    return [np.mean([each[i].mean(axis=(0, 2, 3)) for each in found], axis=0) for i in range(len(names))]


def spread(found, expected):
    """How far channel means are off, as a share of how they differ among channels; a value for each convolution."""
    return np.array([np.abs(f - e).mean() / (e.std() + 1e-6) for f, e in zip(found, expected, strict=True)])


@pytest.fixture(scope="module", params=METHODS)
def case(request):
    quantized, reference = exported(request.param, "tensorrt"), exported(request.param, "float")
    return quantized, reference, correct_biases(quantized, reference, IMAGES)


def test_every_convolution_has_the_means_of_the_float_graph(case):
    quantized, reference, corrected = case
    expected = means(reference)
    assert len(expected) > 5
    before, after = spread(means(quantized), expected), spread(means(corrected), expected)
    assert after.max() < 1e-3
    assert before.mean() > 10 * after.mean()


def test_nothing_but_biases_changes(case):
    quantized, _, corrected = case
    assert [node.op_type for node in corrected.graph.node] == [node.op_type for node in quantized.graph.node]
    before, after = OnnxGraph.of(quantized).arrays, OnnxGraph.of(corrected).arrays
    new = {name for name in after if name not in before}
    assert new
    assert all(after[name].ndim == 1 and after[name].dtype == np.float32 for name in new)
    assert all(np.array_equal(after[name], before[name]) for name in after if name in before)
    assert tensorrt_rules.check(corrected) == tensorrt_rules.check(quantized)
    onnx.checker.check_model(corrected)


def test_the_graph_given_stays_as_it_was(case):
    quantized, _, corrected = case
    assert not any(tensor.name.endswith("corrected_bias") for tensor in quantized.graph.initializer)
    assert any(tensor.name.endswith("corrected_bias") for tensor in corrected.graph.initializer)


def test_a_convolution_that_the_float_graph_lacks():
    reference = ModelProto()
    reference.CopyFrom(exported("stfpm", "float"))
    next(node for node in reference.graph.node if node.op_type == "Conv").name = "another"
    with pytest.raises(UadxError, match="not in the float graph"):
        correct_biases(exported("stfpm", "tensorrt"), reference, IMAGES[:1])
