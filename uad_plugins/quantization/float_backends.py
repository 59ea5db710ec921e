"""The float baselines: the same export without quantizers."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from uad_plugins.hookspecs import QuantizationRequest, QuantizationResult
from uad_plugins.quantization.export import save_onnx, save_openvino, to_onnx, to_openvino
from uad_plugins.quantization.onnx_graph import with_float16_weights
from uad_plugins.registry import installed


def export(request: QuantizationRequest, *, half: bool) -> QuantizationResult:
    """Write the float model of a request; see ``write``."""
    return write(request.core, request.image_size, request.folder, half=half)


def write(core: nn.Module, image_size: tuple[int, int], folder: Path, *, half: bool) -> QuantizationResult:
    """Write ``model.onnx`` and, where OpenVINO is installed, ``model.xml``.

    Args:
        core: Network from a normalised image to score and map.
        image_size: ``(height, width)``.
        folder: Where to.
        half: Store weights as FP16. The arithmetic stays what the engine makes it: on a CPU FP32.
    """
    model = to_onnx(core, image_size)
    path = save_onnx(model, folder / "model.onnx")
    files = ["model.onnx"]
    if installed("openvino"):
        save_openvino(to_openvino(path), folder / "model.xml", half=half)
        files += ["model.xml", "model.bin"]
    if half:
        save_onnx(with_float16_weights(model), path)
    return QuantizationResult(files, "fp16" if half else "fp32", "float")
