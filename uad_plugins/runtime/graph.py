"""What is done to an OpenVINO model before it runs on a CPU: rewrites that keep its results. No torch in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import Layout, Type, opset13
from openvino.preprocess import PrePostProcessor

LINEAR = frozenset({"linear", "linear_onnx"})
HALF_PIXEL = frozenset({"half_pixel", "pytorch_half_pixel"})
ALIGNED = "align_corners"


def read(path: Path) -> Any:
    """Read a model file as an ``openvino.Model``.

    ONNX is converted, not read as it is: without the clean-up of the conversion OpenVINO's INT8 kernels give wrong results
    where a signed quantizer stands before a max-pool (maps of Uninformed Students are 43 % off).
    """
    return openvino.convert_model(path) if path.suffix == ".onnx" else openvino.Core().read_model(path)


def prepare(model: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Return a model that takes 8-bit pixels, and whose maps are enlarged and smoothed by products of matrices.

    Args:
        model: ``openvino.Model`` that takes one normalised image, float32 ``(1, 3, H, W)``. It is changed.
        mean: Of each channel, of images in 0..1.
        std: Of each channel.

    Returns:
        A model that takes uint8 ``(1, H, W, 3)`` in RGB order.
    """
    multiply_instead_of_resizing(model)
    multiply_instead_of_filtering(model)
    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(Type.u8).set_layout(Layout("NHWC"))
    steps.input().model().set_layout(Layout("NCHW"))
    normalising = steps.input().preprocess().convert_element_type(Type.f32)
    normalising.mean([255 * value for value in mean]).scale([255 * value for value in std])
    return steps.build()


def multiply_instead_of_resizing(model: Any) -> int:
    """Replace the bilinear enlargement of single-channel maps by two matrix products, and return how many were replaced.

    Bilinear resizing is linear in rows and in columns: ``A @ map @ B`` with constant matrices. It is the same arithmetic,
    summed in another order: results agree to the last bits of float32. OpenVINO's own resizing of a single channel took
    1.5 ms of 12 in an INT8 network at 256 pixels on the CPU it was measured on, the products take 0.15.

    Args:
        model: ``openvino.Model``. It is changed.
    """
    replaced = 0
    for node in model.get_ordered_ops():
        if not _is_enlarged_map(node):
            continue
        source, result = node.input_value(0), node.output(0)
        aligned = node.get_attributes()["coordinate_transformation_mode"] == ALIGNED
        (height, width), (tall, wide) = list(source.get_shape())[2:], list(result.get_shape())[2:]
        rows = opset13.constant(interpolation(height, tall, aligned=aligned))
        columns = opset13.constant(interpolation(width, wide, aligned=aligned))
        product = opset13.matmul(rows, opset13.matmul(source, columns, False, True), False, False)
        product.set_friendly_name(f"{node.get_friendly_name()}/product")
        result.replace(product.output(0))
        replaced += 1
    if replaced:
        model.validate_nodes_and_infer_types()
    return replaced


def multiply_instead_of_filtering(model: Any) -> int:
    """Replace separable filters of single-channel maps by two matrix products, and return how many were replaced.

    A Gaussian is a filter of rows and one of columns. The same arithmetic as ``multiply_instead_of_resizing``. OpenVINO's
    convolution of a single channel with the 33 x 33 values of Reverse Distillation took half of an INT8 network's time.

    Args:
        model: ``openvino.Model``. It is changed.
    """
    replaced = 0
    for node in model.get_ordered_ops():
        factors = _separable_filter(node)
        if factors is None:
            continue
        source, result, facts = node.input_value(0), node.output(0), node.get_attributes()
        sizes = zip(factors, list(source.get_shape())[2:], list(result.get_shape())[2:], facts["pads_begin"], strict=True)
        rows, columns = (opset13.constant(filtering(*given)) for given in sizes)
        product = opset13.matmul(rows, opset13.matmul(source, columns, False, True), False, False)
        product.set_friendly_name(f"{node.get_friendly_name()}/product")
        result.replace(product.output(0))
        replaced += 1
    if replaced:
        model.validate_nodes_and_infer_types()
    return replaced


def filtering(weights: NDArray[np.float64], size: int, target: int, padding: int) -> NDArray[np.float32]:
    """Return the matrix ``(target, size)`` that filters ``size`` values, with zeros beyond them.

    Args:
        weights: Of the filter, as a convolution of neural networks applies them: not mirrored.
        size: Values there are.
        target: Values wanted.
        padding: Zeros before the first value.
    """
    places = np.arange(target)[:, None] - padding + np.arange(len(weights))
    inside = (places >= 0) & (places < size)
    matrix = np.zeros((target, size))
    matrix[np.nonzero(inside)[0], places[inside]] = np.broadcast_to(weights, places.shape)[inside]
    return matrix.astype(np.float32)


def _separable_filter(node: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the filters of columns and of rows that a convolution of one channel consists of; None for all others."""
    if node.get_type_name() != "Convolution":
        return None
    facts, weight = node.get_attributes(), node.input_value(1).get_node()
    source = node.input_value(0)
    if (
        weight.get_type_name() != "Constant"
        or list(weight.get_output_shape(0))[:2] != [1, 1]
        or len(weight.get_output_shape(0)) != 4
        or source.get_partial_shape().is_dynamic
        or source.get_shape()[0] != 1
        or source.get_element_type() != Type.f32
        or any(value != 1 for value in [*facts["strides"], *facts["dilations"]])
        or facts["auto_pad"] not in {"explicit", "notset"}
    ):
        return None
    left, sizes, right = np.linalg.svd(np.asarray(weight.data, np.float64)[0, 0])
    if len(sizes) < 2 or sizes[1] > 1e-6 * sizes[0]:
        return None
    return left[:, 0] * np.sqrt(sizes[0]), right[0] * np.sqrt(sizes[0])


def interpolation(size: int, target: int, *, aligned: bool) -> NDArray[np.float32]:
    """Return the matrix ``(target, size)`` that interpolates linearly between ``size`` values.

    Args:
        size: Values there are.
        target: Values wanted.
        aligned: The first and last values stay where they are; otherwise values are the middles of pixels, and what lies
            beyond the outer middles is the outer value.
    """
    wanted = np.arange(target)
    places = wanted * (size - 1) / max(target - 1, 1) if aligned else (wanted + 0.5) * size / target - 0.5
    places = np.clip(places, 0, size - 1)
    lower = np.floor(places).astype(np.int64)
    share = places - lower
    matrix = np.zeros((target, size))
    matrix[wanted, lower] += 1 - share
    matrix[wanted, np.minimum(lower + 1, size - 1)] += share
    return matrix.astype(np.float32)


def _is_enlarged_map(node: Any) -> bool:
    """Tell a map ``(1, 1, h, w)`` that is enlarged bilinearly from other resizing, which stays as it is."""
    if node.get_type_name() != "Interpolate":
        return False
    facts = node.get_attributes()
    source, result = node.input_value(0), node.output(0)
    if source.get_partial_shape().is_dynamic or result.get_partial_shape().is_dynamic:
        return False
    before, after = list(source.get_shape()), list(result.get_shape())
    return (
        facts["mode"] in LINEAR
        and facts["coordinate_transformation_mode"] in HALF_PIXEL | {ALIGNED}
        and not facts["antialias"]
        and not any([*facts["pads_begin"], *facts["pads_end"]])
        and source.get_element_type() == Type.f32
        and len(before) == 4
        and before[:2] == after[:2] == [1, 1]
        and after[2] >= before[2]
        and after[3] >= before[3]
    )
