"""Registers the built-in quantization backends."""

from __future__ import annotations

from uad_plugins.hookspecs import NoOptions, QuantizationRequest, QuantizationResult, QuantizerPlugin, Requirement, hookimpl
from uad_plugins.quantization.options import OpenvinoOptions, QatOptions, TensorrtOptions

TRAIN = tuple(Requirement(module, "pip install 'uadx[train]'") for module in ("torch", "anomalib"))
"""Of all of them: the trained network is opened with these."""
ONNX = (*TRAIN, Requirement("onnx", "pip install 'uadx[onnx]'"), Requirement("onnxruntime", "pip install 'uadx[onnx]'"))
OPENVINO = (Requirement("openvino", "pip install 'uadx[openvino]'"), Requirement("nncf", "pip install 'uadx[openvino]'"))


def _fp32(request: QuantizationRequest) -> QuantizationResult:
    from uad_plugins.quantization.float_backends import export

    return export(request, half=False)


def _fp16(request: QuantizationRequest) -> QuantizationResult:
    from uad_plugins.quantization.float_backends import export

    return export(request, half=True)


def _openvino_int8(request: QuantizationRequest) -> QuantizationResult:
    from uad_plugins.quantization.openvino_int8 import quantize

    return quantize(request)


def _tensorrt_int8(request: QuantizationRequest) -> QuantizationResult:
    from uad_plugins.quantization.tensorrt_int8 import quantize

    return quantize(request)


def _nncf_qat(request: QuantizationRequest) -> QuantizationResult:
    from uad_plugins.quantization.nncf_qat import quantize

    return quantize(request)


@hookimpl
def uadx_register_quantizers() -> list[QuantizerPlugin]:
    """Return the two float baselines and the three INT8 backends."""
    return [
        QuantizerPlugin(
            "fp32", "no quantization: the baseline, as ONNX and OpenVINO", _fp32, NoOptions, ONNX, calibrated=False
        ),
        QuantizerPlugin("fp16", "weights stored as FP16, as ONNX and OpenVINO", _fp16, NoOptions, ONNX, calibrated=False),
        QuantizerPlugin(
            "openvino-int8",
            "post-training INT8 for CPUs, as OpenVINO",
            _openvino_int8,
            OpenvinoOptions,
            (*ONNX, *OPENVINO),
        ),
        QuantizerPlugin(
            "tensorrt-int8",
            "post-training INT8 by TensorRT's rules, as ONNX with Q/DQ",
            _tensorrt_int8,
            TensorrtOptions,
            (*ONNX, *OPENVINO),
            calibrated=lambda options: options.source is None,
        ),
        QuantizerPlugin(
            "nncf-qat",
            "INT8 with quantization-aware training, as ONNX with Q/DQ and OpenVINO",
            _nncf_qat,
            QatOptions,
            (*ONNX, *OPENVINO),
            frozenset({"export", "qat"}),
        ),
    ]
