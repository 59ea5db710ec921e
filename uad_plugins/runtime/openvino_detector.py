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
    """

    engine = "openvino"

    def __init__(
        self, path: Path, manifest: QuantizedManifest, thresholds: Thresholds, name: str, threads: int | None = None
    ) -> None:
        super().__init__(path, manifest, thresholds, name)
        # What is float stays FP32: BF16, the default where the CPU has it, rounds the distances of the map to 8 bits.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._model = checked(path, lambda file: openvino.Core().compile_model(_read(file), "CPU", options))
        self._request = self._model.create_infer_request()

    def run(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Run the model; see ``ExportedDetector.run``."""
        results = self._request.infer([image])
        return np.array(results[0], np.float32), np.array(results[1], np.float32)


def _read(path: Path) -> Any:
    """Read a model file.

    ONNX is converted, not compiled as it is: without the clean-up that conversion does OpenVINO's INT8 kernels give wrong
    results where a signed quantizer stands before a max-pool (maps of Uninformed Students are 43 % off).
    """
    return openvino.convert_model(path) if path.suffix == ".onnx" else openvino.Core().read_model(path)
