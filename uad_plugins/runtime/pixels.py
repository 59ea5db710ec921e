"""Giving an OpenVINO model an input of 8-bit pixels: normalisation and layout become part of the graph. No torch in here."""

from __future__ import annotations

from typing import Any

from openvino import Layout, Type
from openvino.preprocess import PrePostProcessor


def with_pixels(model: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Return a model that takes uint8 ``(1, H, W, 3)`` in RGB order.

    Args:
        model: ``openvino.Model`` that takes one normalised image, float32 ``(1, 3, H, W)``. It is changed.
        mean: Of each channel, of images in 0..1.
        std: Of each channel.
    """
    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(Type.u8).set_layout(Layout("NHWC"))
    steps.input().model().set_layout(Layout("NCHW"))
    normalising = steps.input().preprocess().convert_element_type(Type.f32)
    normalising.mean([255 * value for value in mean]).scale([255 * value for value in std])
    return steps.build()
