"""What TensorRT asks of a quantized ONNX graph, checked without TensorRT, torch or a GPU.

The rules come from the sources of its ONNX parser (8.5 to 10) and NVIDIA's documentation of explicit quantization. Some hold
for every engine; ``OPENVINO`` names those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from uad_plugins.quantization.graph import CONSTANT, CONV, TRANSPOSED
from uad_plugins.quantization.onnx_graph import DEQUANTIZE, QUANTIZE, OnnxGraph, attribute, quantizers, static_shape
from uad_plugins.quantization.tensorrt_versions import OLDEST, PARSERS, Parser

PASSING = {
    "MaxPool",
    "Concat",
    "Relu",
    "Slice",
    "Reshape",
    "Transpose",
    "Pad",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
}
"""Operators between a DequantizeLinear and the convolution that it serves: TensorRT moves quantization across them."""


@dataclass(frozen=True)
class Subject:
    """A model that is checked.

    Attributes:
        model: The model.
        graph: Its operations.
        parser: What has to read it.
        whole: Every convolution of the network has to be quantized.
    """

    model: ModelProto
    graph: OnnxGraph
    parser: Parser
    whole: bool = True


def check(
    model: ModelProto, rules: Iterable[str] | None = None, *, version: str = OLDEST, whole: bool = True
) -> dict[str, list[str]]:
    """Check a quantized graph.

    Args:
        model: The model.
        rules: Names of ``RULES``; None: all, as TensorRT wants them.
        version: Of TensorRT, of ``PARSERS``; the oldest by default, because what it takes all take.
        whole: Every convolution of the network has to be quantized; False for scope ``student``.

    Returns:
        What is wrong by rule; an empty list for a rule that is kept.
    """
    subject = Subject(model, OnnxGraph.of(model), PARSERS[version], whole)
    return {name: RULES[name](subject) for name in (RULES if rules is None else rules)}


def by_version(model: ModelProto) -> dict[str, list[str]]:
    """Return what the parser of each version of TensorRT does not take of a graph; nothing for those it is good for."""
    graph = OnnxGraph.of(model)
    found = {}
    for version, parser in PARSERS.items():
        subject = Subject(model, graph, parser)
        found[version] = [case for rule in OF_A_VERSION for case in RULES[rule](subject)]
    return found


def placement(model: ModelProto) -> dict[str, Any]:
    """Return what of a graph is quantized: convolutions in all and with INT8 weights, those left, quantized activations."""
    graph = OnnxGraph.of(model)
    convolutions, moving = graph.convolutions(), graph.moving()
    left = [name for name in convolutions if not graph.is_dequantized(graph.inputs[name].get(1, ""))]
    return {
        "convolutions": len(convolutions),
        "quantized": len(convolutions) - len(left),
        "in_float": left,
        "activations": sum(node.op_type == QUANTIZE and name in moving for name, node in quantizers(graph)),
    }


def _opset(subject: Subject) -> list[str]:
    versions = {entry.domain or "ai.onnx": entry.version for entry in subject.model.opset_import}
    newest = versions.get("ai.onnx", 0)
    return [f"opset {newest} is newer than {subject.parser.max_opset}"] if newest > subject.parser.max_opset else []


def _operators(subject: Subject) -> list[str]:
    return [
        f"{node.name or name}: {node.domain or 'ai.onnx'}::{node.op_type}"
        for name, node in subject.graph.nodes.items()
        if node.domain not in {"", "ai.onnx"} or node.op_type not in subject.parser.operators
    ]


def _static(subject: Subject) -> list[str]:
    ends = [*subject.model.graph.input, *subject.model.graph.output]
    return [f"{value.name}: its shape is not fixed" for value in ends if static_shape(value) is None]


def _complete(subject: Subject) -> list[str]:
    """Scale and zero point are there, and are constants themselves: an Identity between is a layer to TensorRT 8."""
    graph, wrong = subject.graph, []
    for name, node in quantizers(graph):
        if len(node.input) < 3:
            wrong.append(f"{name}: has no zero point")
        wrong += [f"{name}: {tensor} is computed" for tensor in node.input[1:] if tensor not in graph.arrays]
    return wrong


def _identities(subject: Subject) -> list[str]:
    graph = subject.graph
    return [
        f"{name}: Identity of a constant"
        for name, node in graph.nodes.items()
        if node.op_type == "Identity" and graph.kinds.get(graph.through(name, {"Identity"})) == CONSTANT
    ]


def _signed(subject: Subject) -> list[str]:
    graph = subject.graph
    points = {name: graph.arrays.get(node.input[2]) for name, node in quantizers(graph) if len(node.input) > 2}
    return [f"{n}: zero point of type {p.dtype}" for n, p in points.items() if p is not None and p.dtype != np.int8]


def _zero_points(subject: Subject) -> list[str]:
    graph = subject.graph
    points = {name: graph.arrays.get(node.input[2]) for name, node in quantizers(graph) if len(node.input) > 2}
    return [f"{n}: zero point is not 0" for n, p in points.items() if p is not None and bool(np.any(p != 0))]


def _scales(subject: Subject) -> list[str]:
    graph, wrong = subject.graph, []
    for name, node in quantizers(graph):
        scale, data = graph.arrays.get(node.input[1]), graph.arrays.get(node.input[0])
        if scale is None:
            continue
        if not _positive(scale):
            wrong.append(f"{name}: a scale is not above 0")
        axis = attribute(node, "axis")
        place = int(axis) if isinstance(axis, int) else 1
        if scale.ndim == 1 and len(scale) > 1 and data is not None and len(scale) != data.shape[place]:
            wrong.append(f"{name}: {len(scale)} scales for {data.shape[place]} channels")
        point = graph.arrays.get(node.input[2]) if len(node.input) > 2 else None
        if point is not None and point.shape != scale.shape:
            wrong.append(f"{name}: scale and zero point differ in shape")
    return wrong


def _positive(scale: NDArray[Any]) -> bool:
    return bool(np.isfinite(scale).all() and (scale > 0).all())


def _per_channel(subject: Subject) -> list[str]:
    """Only weights have a scale for each channel."""
    graph, moving = subject.graph, subject.graph.moving()
    return [
        f"{name}: {scale.size} scales for an activation"
        for name, node in quantizers(graph)
        if (scale := graph.arrays.get(node.input[1])) is not None and scale.size > 1 and name in moving
    ]


def _axis(subject: Subject) -> list[str]:
    """A convolution's weight has one scale for each output channel, along axis 0."""
    graph, wrong = subject.graph, []
    for name in graph.convolutions():
        source = graph.inputs[name].get(1, "")
        if graph.kinds[name] != CONV or not graph.is_dequantized(source):
            continue
        scale = graph.arrays.get(graph.nodes[source].input[1])
        if scale is not None and (scale.ndim != 1 or attribute(graph.nodes[source], "axis") != 0):
            wrong.append(f"{name}: its weight's scales do not lie along axis 0")
    return wrong


def _transposed(subject: Subject) -> list[str]:
    """A transposed convolution's weight has one scale: TensorRT versions disagree on its channel axis."""
    graph, wrong = subject.graph, []
    for name in graph.convolutions():
        source = graph.inputs[name].get(1, "")
        if graph.kinds[name] == TRANSPOSED and graph.is_dequantized(source):
            scale = graph.arrays.get(graph.nodes[source].input[1])
            if scale is not None and scale.size != 1:
                wrong.append(f"{name}: {scale.size} scales for the weight of a transposed convolution")
    return wrong


def _residual(subject: Subject) -> list[str]:
    """A residual addition takes the convolution's result as it is, and the skip branch dequantized."""
    graph, wrong = subject.graph, []
    for name, main, skip in graph.additions():
        if graph.is_dequantized(main):
            wrong.append(f"{name}: the main branch is quantized, which prevents fusion")
        if subject.whole and not graph.is_dequantized(graph.through(skip, PASSING)):
            wrong.append(f"{name}: the skip branch is not quantized")
    return wrong


def _coverage(subject: Subject) -> list[str]:
    """A convolution's input and weight are quantized, both or neither; of the whole network unless told otherwise."""
    graph, wrong = subject.graph, []
    for name in graph.convolutions():
        weight = graph.is_dequantized(graph.inputs[name].get(1, ""))
        data = _all_dequantized(graph, graph.inputs[name][0])
        if weight != data:
            wrong.append(f"{name}: {'input' if weight else 'weight'} not quantized")
        elif subject.whole and not weight:
            wrong.append(f"{name}: not quantized")
    return wrong


def _all_dequantized(graph: OnnxGraph, name: str) -> bool:
    """Tell whether a tensor is dequantized, or passes on nothing but such tensors."""
    node = graph.nodes.get(name)
    if node is None or node.op_type == DEQUANTIZE:
        return node is not None
    moving = graph.moving()
    sources = [source for source in graph.inputs[name].values() if source in moving]
    return node.op_type in PASSING and bool(sources) and all(_all_dequantized(graph, source) for source in sources)


def _head(subject: Subject) -> list[str]:
    """The arithmetic of the map stays float: rounding distances to 256 steps loses small defects."""
    head = subject.graph.head()
    return [f"{name}: quantizer in the head" for name, node in quantizers(subject.graph) if name in head]


def _gates(subject: Subject) -> list[str]:
    """Gates stay float, what they take and their weights: they see one pixel."""
    graph, gates = subject.graph, subject.graph.gates()
    return [f"{name}: quantizer in a gate" for name, _ in quantizers(graph) if gates & {name, *graph.outputs[name]}]


def _weights(subject: Subject) -> list[str]:
    """There is something quantized at all."""
    count = sum(node.op_type == QUANTIZE for _, node in quantizers(subject.graph))
    return [] if count else ["no node is quantized"]


RULES: dict[str, Callable[[Subject], list[str]]] = {
    "opset": _opset,
    "operators": _operators,
    "static shapes": _static,
    "quantized": _weights,
    "complete quantizers": _complete,
    "no identity on constants": _identities,
    "signed": _signed,
    "zero points are 0": _zero_points,
    "scales": _scales,
    "per-channel only on weights": _per_channel,
    "axis of weights": _axis,
    "transposed convolutions": _transposed,
    "residual additions": _residual,
    "coverage": _coverage,
    "float head": _head,
    "float gates": _gates,
}
"""Every rule; what TensorRT wants is all of them."""

OF_A_VERSION = ("opset", "operators")
"""Rules that differ between versions of TensorRT."""

OPENVINO = tuple(name for name in RULES if name not in {"opset", "signed", "residual additions", "transposed convolutions"})
"""Rules that a graph for OpenVINO and ONNX Runtime keeps too."""
