"""Sequential bias correction gives the convolutions of a quantized network the channel means of the float one."""

from copy import deepcopy

import numpy as np
import onnxruntime
import pytest
import torch
from networks import METHODS, SIDE, core, exported, noise, quantized
from onnx import ModelProto, ValueInfoProto
from torch import nn

from uad_plugins.quantization.bias_correction import correct_biases
from uad_plugins.quantization.export import to_onnx
from uad_plugins.quantization.onnx_graph import OnnxGraph
from uad_plugins.quantization.scope import TorchGraph
from uad_plugins.quantization.torch_quantization import strip

IMAGES = noise(6, seed=5)


def means(model):
    """The channel means of what each convolution (with the normalization behind it) gives, by ONNX Runtime, by its name."""
    graph = OnnxGraph.of(model)
    convolutions = graph.convolutions()
    nodes = [name for name in graph.nodes if name in convolutions]
    places = [
        after[0] if len(after := graph.outputs[name]) == 1 and graph.kinds[after[0]] == "norm" else name for name in nodes
    ]
    extended = ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(ValueInfoProto(name=place) for place in places)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(extended.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [session.run(places, {"images": image.numpy()}) for image in IMAGES]
    averages = [np.mean([each[i].mean(axis=(0, 2, 3)) for each in found], axis=0) for i in range(len(places))]
    return {graph.nodes[name].name: average for name, average in zip(nodes, averages, strict=True)}


def spread(found, expected):
    """How far channel means are off, as a share of how they differ among channels; a value for each convolution."""
    return np.array([np.abs(found[n] - e).mean() / (e.std() + 1e-6) for n, e in expected.items()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", ["openvino", "tensorrt"])
def test_every_convolution_has_the_means_of_the_float_network(method, profile):
    model, reference = deepcopy(quantized(method, profile)), core(method)
    before = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in before.items()}
    graph = TorchGraph.of(reference, IMAGES[0])
    corrected = correct_biases(model, reference, graph, IMAGES)
    assert corrected == len(graph.convolutions()) > 5
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(before[name].ndim == 1 and "scale" not in name for name in changed)
    expected = means(exported(method, "float"))
    start, end = (
        spread(means(graph), expected)
        for graph in (exported(method, profile), to_onnx(strip(model, IMAGES[0]), (SIDE, SIDE)))
    )
    # Folded normalizations round a few values the other way.
    assert end.max() < 0.01
    assert start.mean() > 5 * end.mean()


class Twice(nn.Module):
    """A convolution without a bias, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.bare = nn.Conv2d(3, 4, 3, bias=False)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.own = nn.Conv2d(4, 2, 1)

    def forward(self, images):
        return self.own(self.shared(self.shared(self.bare(images))))


def test_what_has_no_bias_of_its_own_is_left_alone():
    reference, model = Twice(), Twice()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert correct_biases(model, reference, TorchGraph.of(reference, IMAGES[0]), IMAGES) == 1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"own.bias"}
    with torch.no_grad():
        found, expected = (torch.cat([net(image) for image in IMAGES]).mean(dim=(0, 2, 3)) for net in (model, reference))
    assert torch.allclose(found, expected, atol=1e-5)
