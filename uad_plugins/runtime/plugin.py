"""Registers the engines for exported models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uad_plugins.hookspecs import Requirement, RuntimePlugin, hookimpl

if TYPE_CHECKING:
    from uad_plugins.detector import Detector


def _open_openvino(folder: Path) -> Detector | None:
    from uad_plugins.runtime.exported import find_model

    found = find_model(folder, ("model.xml", "model.onnx"))
    if found is None:
        return None
    from uad_plugins.runtime.openvino_detector import OpenVinoDetector

    return OpenVinoDetector(*found, name=str(folder))


def _open_onnxruntime(folder: Path) -> Detector | None:
    from uad_plugins.runtime.exported import find_model

    found = find_model(folder, ("model.onnx",))
    if found is None:
        return None
    from uad_plugins.runtime.onnxruntime_detector import OnnxRuntimeDetector

    return OnnxRuntimeDetector(*found, name=str(folder))


@hookimpl
def uadx_register_runtimes() -> list[RuntimePlugin]:
    """Return OpenVINO and ONNX Runtime."""
    return [
        RuntimePlugin(
            name="openvino",
            summary="runs a quantized model on Intel and ARM CPUs",
            open=_open_openvino,
            requires=(Requirement("openvino", "pip install 'uadx[openvino]'"),),
            priority=1,
        ),
        RuntimePlugin(
            name="onnxruntime",
            summary="runs a quantized model with ONNX Runtime",
            open=_open_onnxruntime,
            requires=(Requirement("onnxruntime", "pip install 'uadx[onnx]'"),),
        ),
    ]
