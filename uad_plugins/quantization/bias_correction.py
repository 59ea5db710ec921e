"""Sequential bias correction of a Q/DQ graph. No torch in here.

Rounding shifts the mean of what a convolution gives, and the shifts add up from layer to layer. In the order of
execution each convolution's bias takes up the difference of its channels' means to those of the float graph, with all
corrections before it in place (Nagel et al., arXiv 1906.04721, section 4.2, measured instead of derived). NNCF does this
for OpenVINO's graphs alone; for torch it has but the kind that looks at each layer by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from uad_plugins.errors import UadxError
from uad_plugins.quantization.graph import CONSTANT, NORM
from uad_plugins.quantization.onnx_graph import OnnxGraph, drop_unused, set_initializer
from uad_plugins.runtime.exported import FloatArray

BIAS = 2
"""Input of a convolution, and of a normalization behind it, that is added to each channel."""


def correct_biases(model: ModelProto, reference: ModelProto, images: Sequence[FloatArray]) -> ModelProto:
    """Return a copy of a Q/DQ graph whose convolutions have the channel means of the float graph.

    Args:
        model: Graph with Q/DQ nodes and one input.
        reference: Float graph of the same network: its convolutions have the same names.
        images: float32 ``(1, 3, H, W)``, normalised.

    Raises:
        UadxError: A convolution of the network is not in the float graph.
    """
    corrected = ModelProto()
    corrected.CopyFrom(model)
    graph, original = OnnxGraph.of(corrected), OnnxGraph.of(reference)
    places = {_last(original, name): node.name for name, node in original.nodes.items() if name in original.convolutions()}
    names = {node: place for place, node in places.items()}
    wanted = _means(reference, list(places), images)
    convolutions = graph.convolutions()
    for name in (name for name in graph.nodes if name in convolutions):
        place = _last(graph, name)
        expected = wanted.get(names.get(graph.nodes[name].name, ""))
        if expected is None:
            raise UadxError(f"{graph.nodes[name].name}: not in the float graph", "use bias_correction=fast")
        _add(corrected, graph, graph.nodes[place], expected - _means(corrected, [place], images)[place])
    return corrected


def _last(graph: OnnxGraph, convolution: str) -> str:
    """Return the convolution, or the normalization behind it that has not been folded into it."""
    after = graph.outputs.get(convolution, [])
    return after[0] if len(after) == 1 and graph.kinds[after[0]] == NORM else convolution


def _means(model: ModelProto, names: list[str], images: Sequence[FloatArray]) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each channel of the named tensors ``(1, C, H, W)`` over the images."""
    part = ModelProto()
    part.CopyFrom(model)
    del part.graph.output[:]
    part.graph.output.extend(type(model.graph.output[0])(name=name) for name in names)
    drop_unused(part)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As the graph says: what an engine fuses it may round elsewhere.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    totals = [np.zeros(1) for _ in names]
    for image in images:
        means = [result.mean(axis=(0, 2, 3), dtype=np.float64) for result in session.run(names, {given: image})]
        totals = [total + mean for total, mean in zip(totals, means, strict=True)]
    return {name: total / len(images) for name, total in zip(names, totals, strict=True)}


def _add(model: ModelProto, graph: OnnxGraph, node: NodeProto, shift: NDArray[np.float64]) -> None:
    """Add to the bias of a convolution or normalization; it gets one of its own, others may share what it had."""
    known = node.input[BIAS] if len(node.input) > BIAS else ""
    if known and graph.kinds.get(known) != CONSTANT:
        raise UadxError(f"{node.name}: its bias is computed", "use bias_correction=fast")
    before = graph.arrays[known] if known else np.zeros(len(shift), np.float32)
    name = f"{node.output[0]}_corrected_bias"
    set_initializer(model, name, (before + shift).astype(np.float32))
    if known:
        node.input[BIAS] = name
    else:
        node.input.append(name)
