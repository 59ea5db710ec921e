"""The detector of an exported model, run by OpenVINO on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from uad_plugins.artifacts import checked
from uad_plugins.evaluation.thresholds import Thresholds
from uad_plugins.quantized import QuantizedManifest
from uad_plugins.runtime.exported import ExportedDetector, FloatArray


class OpenVinoDetector(ExportedDetector):
    """Runs ``model.xml`` or ``model.onnx``.

    Args:
        path: The model file.
        manifest: Of the quantized model.
        thresholds: Decision thresholds.
        name: For messages.
        threads: CPU threads; None lets OpenVINO choose.

    A graph by TensorRT's rules is executed as it stands, in float: OpenVINO's INT8 kernels give wrong maps (18 % off) where
    a signed quantizer stands before a max-pool, which those rules ask for and OpenVINO's own never have.
    """

    engine = "openvino"

    def __init__(
        self, path: Path, manifest: QuantizedManifest, thresholds: Thresholds, name: str, threads: int | None = None
    ) -> None:
        super().__init__(path, manifest, thresholds, name)
        # What is float stays FP32: BF16, the default where the CPU has it, rounds the distances of the map to 8 bits.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if manifest.profile == "tensorrt":
            options["LP_TRANSFORMS_MODE"] = "NO"
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._model = checked(path, lambda file: openvino.Core().compile_model(file, "CPU", options))
        self._request = self._model.create_infer_request()

    def run(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Run the model; see ``ExportedDetector.run``."""
        results = self._request.infer([image])
        return np.array(results[0], np.float32), np.array(results[1], np.float32)
