"""Gates: what stays float because it sees one pixel, whatever framework the graph is in."""

import onnx
import openvino
import pytest
import torch
from networks import METHODS, core, exported, noise
from timm.layers import create_attn
from torch.nn import functional as F

from uad_plugins.quantization import openvino_rules
from uad_plugins.quantization.graph import ADD, CONV, INPUT, MEAN, MULTIPLY, TRANSPOSED, Graph
from uad_plugins.quantization.onnx_graph import OnnxGraph
from uad_plugins.quantization.scope import TorchGraph


@pytest.mark.parametrize("method", METHODS)
def test_gates_are_found_whatever_the_framework(method, tmp_path):
    """Those of two blocks in each of two layers, or of each normalization; of no convolution where a network has none."""
    onnx.save(exported(method, "float"), tmp_path / "model.onnx")
    graphs = [
        TorchGraph.of(core(method), noise(1)[0]),
        OnnxGraph.of(exported(method, "float")),
        openvino_rules.OpenvinoGraph.of(openvino.convert_model(tmp_path / "model.onnx")),
    ]
    for graph in graphs:
        inside = [name for name in graph.gates() if graph.kinds[name] in {CONV, TRANSPOSED}]
        # Of each normalization a factor and an addend, and what recognises the product.
        assert len(inside) == {"gated_stfpm": 8, "conditional_stfpm": 2 * 10 + 1}.get(method, 0)
        assert not set(inside) & set(graph.convolutions())
        products = [name for name in graph.gates() if graph.kinds[name] == MULTIPLY]
        assert len(products) >= len(inside) // 2
        # What variances are the mean of, of each layer; torch has squares, others products.
        subtractions = [name for name in graph.gates() if graph.kinds[name].lower().strip("_") in {"sub", "subtract"}]
        varied = {each for name in subtractions for each in graph.outputs[name]}
        assert (len(varied) >= 2) == (method == "conditional_stfpm")
        assert varied <= graph.gates()
    assert len({len(graph.convolutions()) for graph in graphs}) == 1


@pytest.mark.parametrize(
    ("attention", "found"),
    [("se", True), ("ese", True), ("eca", True), ("cbam", False), (None, False)],
)
def test_gates_of_timms_kinds_of_attention(attention, found):
    """What has another way past the mean, or sees single pixels, is none: it is treated as any other arithmetic."""
    layers = [torch.nn.Conv2d(3, 16, 3), create_attn(attention, 16) or torch.nn.Identity(), torch.nn.Conv2d(16, 4, 3)]
    network = torch.nn.Sequential(*layers).eval()
    gates = TorchGraph.of(network, noise(1)[0]).gates()
    assert bool(gates) == found


def test_a_mean_over_channels_or_of_a_region_makes_no_gate():
    class Attention(torch.nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.before, self.within, self.behind = (torch.nn.Conv2d(*each, 1) for each in ((3, 8), (8, 8), (8, 3)))
            self.mean = mean

        def forward(self, x):
            x = self.before(x)
            return self.behind(x * self.within(self.mean(x)).sigmoid())

    means = {
        "all": lambda x: x.mean((2, 3), keepdim=True),
        "pool": lambda x: F.adaptive_avg_pool2d(x, 1),
        "channels": lambda x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
        "regions": lambda x: F.interpolate(F.adaptive_avg_pool2d(x, 2), x.shape[-2:]),
    }
    found = {name: bool(TorchGraph.of(Attention(mean).eval(), noise(1)[0]).gates()) for name, mean in means.items()}
    assert found == {"all": True, "pool": True, "channels": False, "regions": False}


@pytest.mark.parametrize(("elsewhere", "inside"), [(None, True), ("squares", False), ("apart", False)])
def test_what_nothing_but_a_mean_is_taken_of_belongs_to_the_gate(elsewhere, inside):
    """A variance; unless another convolution sees what it is the mean of, which then has to be quantized for that."""
    kinds = {"x": INPUT, "b": CONV, "mean": MEAN, "apart": "Sub", "squares": MULTIPLY, "variance": MEAN, "a": CONV}
    graph = Graph(kinds=kinds | {"product": MULTIPLY, "c": CONV})
    wires = [("x", "b", 0), ("b", "mean", 0), ("b", "apart", 0), ("mean", "apart", 1), ("apart", "squares", 0)]
    wires += [("apart", "squares", 1), ("squares", "variance", 0), ("variance", "a", 0), ("a", "product", 1)]
    wires += [("b", "product", 0), ("product", "c", 0)]
    for wire in wires:
        graph.connect(*wire)
    if elsewhere:
        graph.kinds["d"] = CONV
        graph.connect(elsewhere, "d", 0)
    found = graph.gates()
    assert found >= {"variance", "a", "product"}
    assert not found & {"x", "b", "c", "d"}
    assert ("squares" in found) == (inside or elsewhere == "apart")
    assert ("apart" in found) == inside


def test_what_comes_of_more_than_the_mean_is_no_gate():
    """An encoder's features times those of its decoder, which saw their mean among other things."""
    for seen, expected in (("x", set()), ("mean", {"mean", "a", "add", "product"})):
        graph = Graph(kinds={"x": INPUT, "mean": MEAN, "a": CONV, "add": ADD, "product": MULTIPLY})
        for wire in (("x", "mean", 0), (seen, "a", 0), ("a", "add", 0), ("mean", "add", 1), ("x", "product", 0)):
            graph.connect(*wire)
        graph.connect("add", "product", 1)
        assert graph.gates() == expected
