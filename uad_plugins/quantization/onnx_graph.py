"""ONNX graphs: as a ``Graph``, and the passes that make an exported one plain. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from uad_plugins.quantization.graph import ADD, CONSTANT, CONV, INPUT, MEAN, MULTIPLY, NORM, TRANSPOSED, Graph

KINDS = {
    "Conv": CONV,
    "ConvTranspose": TRANSPOSED,
    "Add": ADD,
    "Mul": MULTIPLY,
    "GlobalAveragePool": MEAN,
    "BatchNormalization": NORM,
}
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass
class OnnxGraph(Graph):
    """The operations of an ONNX graph; a node is named by its first result, an initializer by its name.

    Attributes:
        nodes: Node by name.
        arrays: Initializers and results of ``Constant`` nodes, by name.
    """

    nodes: dict[str, NodeProto] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelProto) -> OnnxGraph:
        """Read the graph of a model."""
        graph = cls()
        owner: dict[str, str] = {}
        for tensor in model.graph.initializer:
            graph.arrays[tensor.name] = numpy_helper.to_array(tensor)
            graph.kinds[tensor.name] = CONSTANT
        for value in model.graph.input:
            graph.kinds.setdefault(value.name, INPUT)
        for node in model.graph.node:
            name = node.output[0]
            owner.update(dict.fromkeys(node.output, name))
            graph.nodes[name] = node
            graph.kinds[name] = KINDS.get(node.op_type, node.op_type)
            if node.op_type == "ReduceMean" and attribute(node, "axes") in ([2, 3], [-2, -1], [-1, -2]):
                graph.kinds[name] = MEAN
            value = attribute(node, "value")
            if node.op_type == "Constant" and isinstance(value, TensorProto):
                graph.arrays[name], graph.kinds[name] = numpy_helper.to_array(value), CONSTANT
        for name, node in graph.nodes.items():
            for port, source in enumerate(node.input):
                if source:
                    graph.connect(owner.get(source, source), name, port)
        for name, kind in graph.kinds.items():
            if kind in {CONV, TRANSPOSED}:
                weight = graph.weight(name)
                groups = int(attribute(graph.nodes[name], "group") or 1)
                if weight is not None:
                    graph.channels[name] = weight.shape[0] if kind == TRANSPOSED else weight.shape[1] * groups
        return graph

    def through(self, name: str, kinds: set[str]) -> str:
        """Follow the first input backwards while the node is of one of the kinds."""
        while name in self.nodes and self.nodes[name].op_type in kinds:
            name = self.inputs[name][0]
        return name

    def weight(self, convolution: str) -> NDArray[Any] | None:
        """Return a convolution's stored weight, int8 or float; None when it is computed."""
        source = self.inputs[convolution].get(1, "")
        return self.arrays.get(self.through(source, {QUANTIZE, DEQUANTIZE, "Identity"}))

    def is_dequantized(self, name: str) -> bool:
        """Tell whether a tensor comes out of a DequantizeLinear."""
        return name in self.nodes and self.nodes[name].op_type == DEQUANTIZE


def attribute(node: NodeProto, name: str) -> Any:
    """Return the value of a node's attribute; None when it is not set."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def plain(model: ModelProto) -> ModelProto:
    """Fold what an exporter leaves: ``Identity``, constant arithmetic, batch normalization behind convolutions.

    Nothing changes in what the graph computes, beyond rounding in the last digits.
    """
    result = ModelProto()
    result.CopyFrom(model)
    _fold_identities(result)
    _constants_to_initializers(result)
    while _fold_constants(result):
        # A shape that is known now may make another one known.
        pass
    for node in list(result.graph.node):
        if node.op_type == "BatchNormalization":
            _fold_normalization(result, node)
    drop_unused(result)
    onnx.checker.check_model(result)
    return result


def _fold_identities(model: ModelProto) -> None:
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    for node in list(model.graph.node):
        for port, name in enumerate(node.input):
            node.input[port] = renamed.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
            model.graph.node.remove(node)


def _constants_to_initializers(model: ModelProto) -> None:
    for node in list(model.graph.node):
        value = attribute(node, "value")
        if node.op_type == "Constant" and isinstance(value, TensorProto):
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            model.graph.node.remove(node)


def _fold_constants(model: ModelProto) -> bool:
    """Compute what does not depend on the image: shapes, and arithmetic on them. Quantizers stay.

    Returns:
        Whether there was anything.
    """
    before = len(model.graph.node)
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    shapes = {value.name: static_shape(value) for value in [*inferred.graph.value_info, *inferred.graph.input]}
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for node in list(model.graph.node):
        if node.op_type in {QUANTIZE, DEQUANTIZE} or len(node.output) != 1:
            continue
        known = shapes.get(node.input[0]) if node.op_type == "Shape" and node.input else None
        if known is not None and not node.attribute:
            value: NDArray[Any] = np.array(known, dtype=np.int64)
        elif all(name in arrays for name in node.input if name):
            (value,) = ReferenceEvaluator(node, opsets=opsets).run(None, {name: arrays[name] for name in node.input if name})
        else:
            continue
        arrays[node.output[0]] = np.asarray(value)
        set_initializer(model, node.output[0], np.asarray(value))
        model.graph.node.remove(node)
    return len(model.graph.node) < before


def static_shape(value: onnx.ValueInfoProto) -> list[int] | None:
    """Return the shape of a tensor; None when it, or a part of it, is not fixed."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in value.type.tensor_type.shape.dim]
    return sizes if all(size > 0 for size in sizes) else None


def _fold_normalization(model: ModelProto, norm: NodeProto) -> None:
    """Fold ``BatchNormalization(Conv(x))`` into the convolution, exactly: of a quantized weight the integers stay."""
    graph = OnnxGraph.of(model)
    source = norm.input[0]
    kind = graph.kinds.get(source)
    if kind not in {CONV, TRANSPOSED} or len(graph.outputs[source]) != 1 or graph.weight(source) is None:
        return
    convolution = graph.nodes[source]
    gamma, beta, mean, variance = (graph.arrays[name].astype(np.float64) for name in norm.input[1:5])
    epsilon = attribute(norm, "epsilon")
    factor = gamma / np.sqrt(variance + (float(epsilon) if isinstance(epsilon, float) else 1e-5))
    axis = 0 if kind == CONV else 1
    if kind == TRANSPOSED and int(attribute(convolution, "group") or 1) != 1:
        return
    if not _scale_weight(model, graph, convolution, factor, axis):
        return
    bias = graph.arrays[convolution.input[2]] if len(convolution.input) > 2 else np.zeros_like(factor)
    name = f"{source}_bias"
    set_initializer(model, name, (beta + (bias.astype(np.float64) - mean) * factor).astype(np.float32))
    weight = convolution.input[1]
    del convolution.input[1:]
    convolution.input.extend([weight, name])
    convolution.output[0] = norm.output[0]
    model.graph.node.remove(norm)


def _scale_weight(model: ModelProto, graph: OnnxGraph, node: NodeProto, factor: NDArray[np.float64], axis: int) -> bool:
    """Multiply a weight's output channels; False when its one scale cannot take them up."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    if node.input[1] in graph.arrays:
        weight = graph.arrays[node.input[1]]
        name = f"{node.output[0]}_weight"
        set_initializer(model, name, (weight * factor.reshape(shape[: weight.ndim])).astype(np.float32))
        node.input[1] = name
        return True
    dequantize = graph.nodes.get(node.input[1])
    if dequantize is None or dequantize.op_type != DEQUANTIZE or dequantize.input[0] not in graph.nodes:
        return False
    quantize = graph.nodes[dequantize.input[0]]
    scale, stored = graph.arrays[quantize.input[1]], graph.arrays.get(quantize.input[0])
    if stored is None or scale.ndim != 1 or len(scale) != len(factor) or quantize.input[1] != dequantize.input[1]:
        return False
    integers = _integers(stored, scale, shape)
    if (integers.min() < -127) and bool((factor < 0).any()):
        return False
    folded = np.where(factor == 0, scale, scale * np.abs(factor)).astype(np.float32)
    values = integers * np.sign(factor).reshape(shape) * folded.reshape(shape)
    names = f"{node.output[0]}_weight", f"{node.output[0]}_weight_scale"
    set_initializer(model, names[0], values.astype(np.float32))
    set_initializer(model, names[1], folded)
    quantize.input[0], quantize.input[1], dequantize.input[1] = names[0], names[1], names[1]
    return True


def _integers(weight: NDArray[Any], scale: NDArray[Any], shape: list[int]) -> NDArray[np.float64]:
    """Quantize as QuantizeLinear does: to the nearest, halves to even, within int8."""
    return np.clip(np.rint(weight.astype(np.float64) / scale.astype(np.float64).reshape(shape)), -128, 127)


def with_int8_weights(model: ModelProto) -> ModelProto:
    """Store quantized weights as int8, with ``DequantizeLinear`` alone behind them."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = OnnxGraph.of(result)
    for name, node in graph.nodes.items():
        if node.op_type != QUANTIZE or node.input[0] not in graph.arrays:
            continue
        weight, scale = graph.arrays[node.input[0]], graph.arrays[node.input[1]]
        shape = [1] * weight.ndim
        if scale.ndim == 1:
            axis = attribute(node, "axis")
            shape[int(axis) if isinstance(axis, int) else 1] = -1
        set_initializer(result, f"{name}_int8", _integers(weight, scale, shape).astype(np.int8))
        for consumer in graph.outputs[name]:
            dequantize = graph.nodes[consumer]
            dequantize.input[0] = f"{name}_int8"
            # One of its own: OpenVINO subtracts a shared one when it runs, and leaves the convolution behind it in float.
            zero_point = f"{consumer}_zero_point"
            set_initializer(result, zero_point, graph.arrays[dequantize.input[2]])
            dequantize.input[2] = zero_point
        result.graph.node.remove(node)
    drop_unused(result)
    onnx.checker.check_model(result)
    return result


def with_float16_weights(model: ModelProto) -> ModelProto:
    """Store float weights of more than one element as FP16 behind a ``Cast`` to FP32; the arithmetic stays as it is."""
    result = ModelProto()
    result.CopyFrom(model)
    casts: list[NodeProto] = []
    for tensor in list(result.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < 64:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    nodes = [*casts, *result.graph.node]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    onnx.checker.check_model(result)
    return result


def set_initializer(model: ModelProto, name: str, values: NDArray[Any]) -> None:
    """Add an initializer, or give the one of that name new values."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(values, order="C"), name))
            return
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, order="C"), name))


def drop_unused(model: ModelProto) -> None:
    """Remove nodes and initializers whose results nothing takes."""
    while True:
        wanted = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
        unused = [node for node in model.graph.node if not wanted & set(node.output)]
        if not unused:
            break
        for node in unused:
            model.graph.node.remove(node)
    for tensor in list(model.graph.initializer):
        if tensor.name not in wanted:
            model.graph.initializer.remove(tensor)


def quantizers(graph: OnnxGraph) -> Iterator[tuple[str, NodeProto]]:
    """Yield the QuantizeLinear and DequantizeLinear nodes by name."""
    yield from ((name, node) for name, node in graph.nodes.items() if node.op_type in {QUANTIZE, DEQUANTIZE})
