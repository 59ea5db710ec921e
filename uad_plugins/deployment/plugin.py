"""Registers the built-in targets."""

from __future__ import annotations

from uad_plugins.deployment.options import OvmsOptions, TritonOptions
from uad_plugins.hookspecs import NoOptions, PackagingRequest, PackagingResult, Requirement, TargetPlugin, hookimpl

ONNX = (Requirement("onnx", "pip install 'uadx[onnx]'"),)
OPENVINO = (Requirement("openvino", "pip install 'uadx[openvino]'"),)


def _openvino_cpu(request: PackagingRequest) -> PackagingResult:
    from uad_plugins.deployment.targets import openvino_cpu

    return openvino_cpu(request)


def _onnx(request: PackagingRequest) -> PackagingResult:
    from uad_plugins.deployment.targets import onnx

    return onnx(request)


def _tensorrt_jetson(request: PackagingRequest) -> PackagingResult:
    from uad_plugins.deployment.targets import tensorrt_jetson

    return tensorrt_jetson(request)


def _ovms(request: PackagingRequest) -> PackagingResult:
    from uad_plugins.deployment.servers import ovms

    return ovms(request)


def _triton(request: PackagingRequest) -> PackagingResult:
    from uad_plugins.deployment.servers import triton

    return triton(request)


@hookimpl
def uadx_register_targets() -> list[TargetPlugin]:
    """Return the targets for devices and for servers."""
    return [
        TargetPlugin(
            "openvino-cpu", "Intel and ARM CPUs: OpenVINO IR that takes 8-bit images", _openvino_cpu, NoOptions, OPENVINO
        ),
        TargetPlugin("onnx", "ONNX Runtime, and whatever else reads ONNX", _onnx, NoOptions, ONNX),
        TargetPlugin(
            "tensorrt-jetson", "NVIDIA Jetson: ONNX and a runner that builds the engine", _tensorrt_jetson, NoOptions, ONNX
        ),
        TargetPlugin("ovms", "OpenVINO Model Server: its model repository", _ovms, OvmsOptions, OPENVINO),
        TargetPlugin("triton", "NVIDIA Triton: its model repository", _triton, TritonOptions, ONNX),
    ]
