"""From a torch network to ONNX, and from ONNX to OpenVINO."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from uad_plugins.artifacts import atomic_path
from uad_plugins.quantization.onnx_graph import plain
from uad_plugins.quantization.quiet import quiet_quantizers

OPSET = 17
"""The newest that TensorRT 8.5 (JetPack 5) reads."""
INPUT, SCORE, MAP = "images", "score", "anomaly_map"


def to_onnx(model: nn.Module, size: tuple[int, int]) -> onnx.ModelProto:
    """Export a network for one image of a fixed size, and fold what can be folded.

    Args:
        model: A ``Core``, float or stripped of NNCF's quantizers, in evaluation.
        size: ``(height, width)``.
    """
    buffer = io.BytesIO()
    example = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with quiet_quantizers(), torch.no_grad():
        # NNCF's and torch's quantizers cannot be exported by the newer exporter.
        torch.onnx.export(
            model,
            (example,),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[SCORE, MAP],
        )
    return plain(onnx.load_from_string(buffer.getvalue()))


def save_onnx(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return path


def save_openvino(model: Any, path: Path, *, half: bool = False) -> Path:
    """Write an ``openvino.Model`` as ``path`` (xml) and the bin file beside it.

    Args:
        model: The model.
        path: Its xml file, in a folder that no other process reads yet.
        half: Store weights as FP16.
    """
    import openvino

    openvino.save_model(model, path, compress_to_fp16=half)
    return path


def to_openvino(path: Path) -> Any:
    """Read an ONNX file as an ``openvino.Model``."""
    import openvino

    return openvino.convert_model(path)
