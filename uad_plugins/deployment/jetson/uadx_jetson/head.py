"""Which layers of a network compute the anomaly map from features: they must not run in half precision.

Features are divided by their norm plus an epsilon of 1e-8 or 1e-12, which is 0 in FP16: a feature vector of zeros, common
behind a ReLU, would become NaN.
"""

from __future__ import annotations

from typing import Any

import tensorrt as trt


def head_layers(network: Any) -> list[Any]:
    """Return the layers that follow the convolutions, in the network's order.

    A layer belongs to the trunk if a convolution or a quantization comes after it, on any path; a convolution of a single
    channel is none of these, it blurs the map. What TensorRT fuses into the last convolutions belongs to the trunk too:
    batch normalisation, activation, and the addition of a residual that an activation follows. All the rest is the head;
    constants and layers on integers are left out, as they have no precision.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    inputs = [_names(layer.num_inputs, layer.get_input) for layer in layers]
    outputs = [_names(layer.num_outputs, layer.get_output) for layer in layers]
    trunk: set[str] = set()
    for layer, needs, gives in zip(reversed(layers), reversed(inputs), reversed(outputs)):
        if _is_trunk(layer) or trunk & gives:
            trunk |= needs | gives
    feeds_only_activations = _feeding_only_activations(layers, inputs)
    head = []
    for layer, needs, gives in zip(layers, inputs, outputs):
        if gives & trunk:
            continue
        fusable = layer.type in (trt.LayerType.ACTIVATION, trt.LayerType.SCALE) or (
            layer.type == trt.LayerType.ELEMENTWISE and gives <= feeds_only_activations
        )
        if fusable and needs <= trunk:
            trunk |= gives
        elif layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE) and _is_float(layer):
            head.append(layer)
    return head


def keep_in_fp32(layer: Any) -> None:
    """Have a layer compute and store its result in FP32; needs the flag that obeys precisions."""
    layer.precision = trt.float32
    for index in range(layer.num_outputs):
        layer.set_output_type(index, trt.float32)


def is_quantized(network: Any) -> bool:
    """Tell whether the network has quantization nodes."""
    return any(network.get_layer(index).type == trt.LayerType.QUANTIZE for index in range(network.num_layers))


def _is_trunk(layer: Any) -> bool:
    if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION):
        return bool(layer.get_input(0).shape[1] > 1)
    return layer.type in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)


def _names(count: int, tensor_at: Any) -> set[str]:
    tensors = [tensor_at(index) for index in range(count)]
    # An optional input that is not given is None.
    return {tensor.name for tensor in tensors if tensor is not None}


def _feeding_only_activations(layers: list[Any], inputs: list[set[str]]) -> set[str]:
    to_activations: set[str] = set()
    to_others: set[str] = set()
    for layer, needs in zip(layers, inputs):
        (to_activations if layer.type == trt.LayerType.ACTIVATION else to_others).update(needs)
    return to_activations - to_others


def _is_float(layer: Any) -> bool:
    return all(layer.get_output(index).dtype == trt.float32 for index in range(layer.num_outputs))
