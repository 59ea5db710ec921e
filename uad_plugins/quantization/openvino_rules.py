"""What a quantized OpenVINO model has to look like. No torch in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uad_plugins.quantization.graph import ADD, CONSTANT, CONV, INPUT, MEAN, MULTIPLY, TRANSPOSED, Graph

KINDS = {
    "Convolution": CONV,
    "GroupConvolution": CONV,
    "ConvolutionBackpropData": TRANSPOSED,
    "GroupConvolutionBackpropData": TRANSPOSED,
    "Add": ADD,
    "Multiply": MULTIPLY,
    "Constant": CONSTANT,
    "Parameter": INPUT,
}
PASSING = {
    "MaxPool",
    "Concat",
    "Relu",
    "PRelu",
    "Slice",
    "StridedSlice",
    "Split",
    "VariadicSplit",
    "Reshape",
    "Transpose",
    "Pad",
}
CONSUMERS = {CONV, TRANSPOSED, "Convert", "FakeQuantize", *PASSING}
"""What may take a quantized activation; anything else would be arithmetic of the map."""


@dataclass
class OpenvinoGraph(Graph):
    """The operations of an OpenVINO model, by friendly name.

    Attributes:
        types: Element type of each constant.
        lows: Lower end of the range of each FakeQuantize, where it is constant.
    """

    types: dict[str, str] = field(default_factory=dict)
    lows: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> OpenvinoGraph:
        """Read the graph of an ``openvino.Model``."""
        graph = cls()
        for node in model.get_ordered_ops():
            name, kind = node.get_friendly_name(), node.get_type_name()
            graph.kinds[name] = KINDS.get(kind, kind)
            if kind == "ReduceMean" and [*node.get_output_partial_shape(0)][2:] == [1, 1]:
                graph.kinds[name] = MEAN
            if kind == "Constant":
                graph.types[name] = node.get_element_type().get_type_name()
            if kind == "FakeQuantize" and (low := node.input_value(1).get_node()).get_type_name() == "Constant":
                graph.lows[name] = float(low.data.min())
            for port, value in enumerate(node.input_values()):
                graph.connect(value.get_node().get_friendly_name(), name, port)
            if graph.kinds[name] in {CONV, TRANSPOSED}:
                graph.channels[name] = int(node.input_values()[0].get_partial_shape()[1].get_length())
        return graph

    def is_quantized(self, name: str) -> bool:
        """Tell whether an activation comes out of a FakeQuantize, or passes on nothing but such activations."""
        kind = self.kinds.get(name, "")
        if kind == "FakeQuantize":
            return True
        moving = self.moving()
        sources = [source for source in self.inputs[name].values() if source in moving] if name in self.inputs else []
        return kind in PASSING | {"Convert"} and bool(sources) and all(self.is_quantized(source) for source in sources)

    def is_positive(self, name: str) -> bool:
        """Tell whether an activation comes out of a ReLU, or passes on nothing but such activations."""
        kind, moving = self.kinds.get(name, ""), self.moving()
        if kind == "Relu":
            return True
        sources = [source for source in self.inputs.get(name, {}).values() if source in moving]
        return kind in PASSING and bool(sources) and all(self.is_positive(source) for source in sources)

    def weight_type(self, convolution: str) -> str:
        """Return the element type that a convolution's weight is stored in."""
        stored = {self.types[name] for name in self.before([self.inputs[convolution][1]]) if name in self.types}
        return "i8" if "i8" in stored else next(iter(sorted(stored)), "")


def check(model: Any, *, whole: bool = True) -> dict[str, list[str]]:
    """Check a quantized ``openvino.Model``, as it is on disk.

    Args:
        model: The model.
        whole: Every convolution of the network has to be quantized.

    Returns:
        What is wrong by rule; an empty list for a rule that is kept.
    """
    graph = OpenvinoGraph.of(model)
    found = {name: rule(graph) for name, rule in RULES.items()}
    found["coverage"] = _coverage(graph, whole)
    found["static shapes"] = [
        f"{port.get_any_name()}: its shape is not fixed"
        for port in [*model.inputs, *model.outputs]
        if port.partial_shape.is_dynamic
    ]
    return found


def placement(model: Any) -> dict[str, Any]:
    """Return what of a model is quantized: convolutions in all and with INT8 weights, those left, quantized activations."""
    graph = OpenvinoGraph.of(model)
    convolutions = graph.convolutions()
    left = [name for name in convolutions if graph.weight_type(name) != "i8"]
    return {
        "convolutions": len(convolutions),
        "quantized": len(convolutions) - len(left),
        "in_float": left,
        "activations": len(_activations(graph)),
    }


def _activations(graph: OpenvinoGraph) -> list[str]:
    moving = graph.moving()
    return [name for name, kind in graph.kinds.items() if kind == "FakeQuantize" and name in moving]


def _head(graph: OpenvinoGraph) -> list[str]:
    """The arithmetic of the map stays float."""
    head = graph.head()
    return [f"{name}: quantizer in the head" for name in _activations(graph) if name in head]


def _gates(graph: OpenvinoGraph) -> list[str]:
    """Gates stay float, what they take and their weights."""
    gates = graph.gates()
    taken = [name for name in _activations(graph) if gates & {name, *graph.outputs[name]}]
    stored = [name for name in gates if graph.kinds[name] == CONV and graph.weight_type(name) == "i8"]
    return [f"{name}: quantized in a gate" for name in sorted({*taken, *stored})]


def _consumers(graph: OpenvinoGraph) -> list[str]:
    """Quantized activations go to convolutions and to what moves tensors about; additions and the head take floats."""
    head = graph.head()
    return [
        f"{name}: feeds {graph.kinds[consumer]}"
        for name in _activations(graph)
        for consumer in graph.outputs[name]
        if consumer not in head and graph.kinds[consumer] not in CONSUMERS
    ]


def _residual(graph: OpenvinoGraph) -> list[str]:
    """Residual additions are done in float, within the convolution before them: quantizing them would only cost accuracy."""
    return [
        f"{name}: the {branch} branch is quantized"
        for name, *branches in graph.additions()
        for branch, source in zip(("main", "skip"), branches, strict=True)
        if graph.kinds[source] == "FakeQuantize"
    ]


def _unsigned(graph: OpenvinoGraph) -> list[str]:
    """What comes out of a ReLU has no sign: half of the steps would never be used."""
    return [
        f"{name}: range from {graph.lows[name]:.3g} behind a ReLU"
        for name in _activations(graph)
        if graph.lows.get(name, 0.0) < 0 and graph.is_positive(graph.inputs[name][0])
    ]


def _quantized(graph: OpenvinoGraph) -> list[str]:
    return [] if _activations(graph) else ["no node is quantized"]


def _coverage(graph: OpenvinoGraph, whole: bool) -> list[str]:
    """A convolution's input is quantized and its weight is stored as int8: both or neither."""
    wrong = []
    for name in graph.convolutions():
        data, weight = graph.is_quantized(graph.inputs[name][0]), graph.weight_type(name) == "i8"
        if data != weight:
            wrong.append(f"{name}: {'weight is not stored as int8' if data else 'input not quantized'}")
        elif whole and not weight:
            wrong.append(f"{name}: not quantized")
    return wrong


RULES: dict[str, Callable[[OpenvinoGraph], list[str]]] = {
    "quantized": _quantized,
    "float head": _head,
    "float gates": _gates,
    "consumers": _consumers,
    "residual additions in float": _residual,
    "unsigned behind ReLU": _unsigned,
}
