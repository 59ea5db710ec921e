"""Registers the engines for exported models: of bundles and of quantized models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uad_plugins.hookspecs import Requirement, RuntimePlugin, hookimpl

if TYPE_CHECKING:
    from uad_plugins.detector import Detector


def _open_openvino(path: Path) -> Detector | None:
    from uad_plugins.runtime.exported import find_model

    found = find_model(path, ("openvino", "onnx"))
    if found is None:
        return None
    from uad_plugins.runtime.openvino_detector import OpenVinoDetector

    return OpenVinoDetector(
        found.path,
        found.facts,
        found.thresholds,
        str(path),
        pixels=found.pixels,
        outputs=found.outputs,
        key=found.key,
    )


def _open_onnxruntime(path: Path) -> Detector | None:
    from uad_plugins.runtime.exported import find_model

    found = find_model(path, ("onnx",))
    if found is None:
        return None
    from uad_plugins.runtime.onnxruntime_detector import OnnxRuntimeDetector

    return OnnxRuntimeDetector(
        found.path, found.facts, found.thresholds, str(path), literal=_saturating(path), outputs=found.outputs
    )


def _saturating(path: Path) -> bool:
    """Tell whether it is a graph for TensorRT whose 8-bit sums saturate on this processor, unless it is run node by node.

    Its thresholds and its AUROC are those of ONNX Runtime, node by node: see ``quantize.judging``.
    """
    from uad_plugins.cpu import saturates
    from uad_plugins.quantized import MANIFEST, Quantized

    return (path / MANIFEST).is_file() and Quantized(path).manifest().profile == "tensorrt" and saturates()


def _open_tensorrt(path: Path) -> Detector | None:
    from uad_plugins.deployment.bundle import Bundle, is_bundle, read_manifest

    # The manifest alone: what is another engine's need not be read from end to end twice.
    if not is_bundle(path) or read_manifest(path).target != "tensorrt-jetson":
        return None
    from uad_plugins.runtime.tensorrt_detector import TensorRtDetector

    return TensorRtDetector(Bundle.open(path))


@hookimpl
def uadx_register_runtimes() -> list[RuntimePlugin]:
    """Return TensorRT, OpenVINO and ONNX Runtime."""
    return [
        RuntimePlugin(
            name="openvino",
            summary="runs bundles and quantized models on Intel and ARM CPUs",
            open=_open_openvino,
            requires=(Requirement("openvino", "pip install 'uadx[openvino-runtime]'"),),
            priority=1,
        ),
        RuntimePlugin(
            name="onnxruntime",
            summary="runs bundles and quantized models with ONNX Runtime",
            open=_open_onnxruntime,
            requires=(Requirement("onnxruntime", "pip install 'uadx[onnx-runtime]'"),),
            preferred=_saturating,
        ),
        RuntimePlugin(
            name="tensorrt",
            summary="runs bundles for Jetson on an NVIDIA GPU",
            open=_open_tensorrt,
            requires=(
                Requirement("tensorrt", "pip install 'uadx[tensorrt]'"),
                Requirement("pycuda", "pip install 'uadx[tensorrt]'"),
            ),
            priority=2,
        ),
    ]
