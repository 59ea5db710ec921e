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
from uad_plugins.quantization.torch_quantization import (
    CHECKPOINT,
    TENSORRT,
    calibrated,
    load_quantized,
    strip,
    was_trained,
)
from uad_plugins.quantized import Quantized


def quantize(request: QuantizationRequest) -> QuantizationResult:
    """Write ``model.onnx``."""
    options: TensorrtOptions = request.options
    if options.source is None:
        model = calibrated(request, options, TENSORRT)
        recalibrate(request.module, model, map(torch.from_numpy, request.calibration.held_out(request.table)))
        result = QuantizationResult(["model.onnx"], "int8", TENSORRT)
    else:
        model, result = _trained(request, options.source)
    exported = to_onnx(strip(model, torch.zeros(1, 3, *request.image_size)), request.image_size)
    if options.weights == "int8":
        exported = with_int8_weights(exported)
    save_onnx(exported, request.folder / "model.onnx")
    return result


def _trained(request: QuantizationRequest, folder: Path) -> tuple[nn.Module, QuantizationResult]:
    """Return the network of a finished ``nncf-qat`` result, and what is to be said of it."""
    station = Quantized.open(folder)
    manifest = station.manifest()
    if manifest.backend != "nncf-qat" or manifest.profile != TENSORRT:
        raise UsageError(
            f"{folder}: is of {manifest.backend} with profile {manifest.profile}",
            "train it with nncf-qat --set profile=tensorrt",
        )
    if manifest.source.get("checkpoint_sha256") != request.run.manifest().checkpoint_sha256:
        raise UadxError(f"{folder}: was trained from another run", "give the run that it was quantized from")
    station.check_files(manifest)
    result = QuantizationResult(
        ["model.onnx"],
        "int8",
        TENSORRT,
        whole=manifest.whole,
        trained=was_trained(manifest.details),
        details={
            "source": str(station.folder.absolute()),
            "source_sha256": manifest.files[CHECKPOINT]["sha256"],
            "source_details": manifest.details,
        },
        calibration=manifest.calibration,
    )
    return load_quantized(request.core, station.folder / CHECKPOINT), result
