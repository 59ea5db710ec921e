"""The detector of an exported model, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from uad_plugins.artifacts import checked
from uad_plugins.evaluation.thresholds import Thresholds
from uad_plugins.imaging import RgbImage
from uad_plugins.runtime.exported import ExportedDetector, Facts, FloatArray, normalise


class OnnxRuntimeDetector(ExportedDetector):
    """Runs ``model.onnx``.

    Args:
        path: The model file.
        facts: What has to be known of it.
        thresholds: Decision thresholds.
        name: For messages.
        threads: CPU threads; None lets ONNX Runtime choose.
        literal: Execute every node as it stands, fusing none: what the graph says, not what the engine makes of it.
        outputs: Names of score and map; None: the first two outputs.
    """

    engine = "onnxruntime"

    def __init__(
        self,
        path: Path,
        facts: Facts,
        thresholds: Thresholds,
        name: str,
        threads: int | None = None,
        literal: bool = False,
        outputs: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(path, facts, thresholds, name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if literal:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = checked(
            path, lambda file: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        )
        self._input = self._session.get_inputs()[0].name
        self._outputs = list(outputs) if outputs else None

    def run(self, image: RgbImage) -> tuple[float, FloatArray]:
        """Run the model; see ``ExportedDetector.run``."""
        score, anomaly_map = self._session.run(self._outputs, {self._input: normalise(image[None], self.mean, self.std)})
        return float(np.reshape(score, ())), np.asarray(anomaly_map, np.float32).reshape(self.image_size)
