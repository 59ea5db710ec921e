"""``tensorrt-int8``: Q/DQ ONNX by TensorRT's rules, calibrated here or trained by ``nncf-qat``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from uad_plugins.errors import UadxError, UsageError
from uad_plugins.hookspecs import QuantizationRequest, QuantizationResult
from uad_plugins.quantization.core import recalibrate
from uad_plugins.quantization.export import save_onnx, to_onnx
from uad_plugins.quantization.onnx_graph import with_int8_weights
from uad_plugins.quantization.options import TensorrtOptions
from uad_plugins.quantization.torch_quantization import TENSORRT, load_quantized, quantize_core, strip
from uad_plugins.quantized import Quantized


def quantize(request: QuantizationRequest) -> QuantizationResult:
    """Write ``model.onnx``."""
    options: TensorrtOptions = request.options
    if options.source is None:
        model = quantize_core(
            request.core,
            [torch.from_numpy(image) for image in request.calibration],
            profile=TENSORRT,
            fast_bias_correction=options.bias_correction == "fast",
            ranges=options.ranges,
        )
        recalibrate(request.module, model, map(torch.from_numpy, request.calibration.held_out(request.table)))
        whole = True
    else:
        model, whole = _trained(request, options.source)
    exported = to_onnx(strip(model, torch.zeros(1, 3, *request.image_size)), request.image_size)
    if options.weights == "int8":
        exported = with_int8_weights(exported)
    save_onnx(exported, request.folder / "model.onnx")
    return QuantizationResult(["model.onnx"], "int8", TENSORRT, whole=whole)


def _trained(request: QuantizationRequest, folder: Path) -> tuple[nn.Module, bool]:
    """Return the network of a finished ``nncf-qat`` result, and whether all of it is quantized."""
    station = Quantized.open(folder)
    manifest = station.manifest()
    if manifest.backend != "nncf-qat" or manifest.profile != TENSORRT:
        raise UsageError(
            f"{folder}: is of {manifest.backend} with profile {manifest.profile}",
            "train it with nncf-qat --set profile=tensorrt",
        )
    if manifest.source.get("checkpoint_sha256") != request.run.manifest().checkpoint_sha256:
        raise UadxError(f"{folder}: was trained from another run", "give the run that it was quantized from")
    return load_quantized(request.core, folder / "quantized.ckpt"), manifest.options.get("scope") == "all"
