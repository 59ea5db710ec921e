"""The float baselines: the same export without quantizers."""

from __future__ import annotations

import importlib.util

from uad_plugins.hookspecs import QuantizationRequest, QuantizationResult
from uad_plugins.quantization.export import save_onnx, save_openvino, to_onnx, to_openvino
from uad_plugins.quantization.onnx_graph import with_float16_weights


def export(request: QuantizationRequest, *, half: bool) -> QuantizationResult:
    """Write ``model.onnx`` and, where OpenVINO is installed, ``model.xml``.

    Args:
        request: What to export.
        half: Store weights as FP16. The arithmetic stays what the engine makes it: on a CPU FP32.
    """
    model = to_onnx(request.core, request.image_size)
    path = save_onnx(model, request.folder / "model.onnx")
    files = ["model.onnx"]
    if importlib.util.find_spec("openvino") is not None:
        save_openvino(to_openvino(path), request.folder / "model.xml", half=half)
        files += ["model.xml", "model.bin"]
    if half:
        save_onnx(with_float16_weights(model), path)
    return QuantizationResult(files, "fp16" if half else "fp32", "float")
