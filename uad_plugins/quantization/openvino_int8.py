"""``openvino-int8``: post-training quantization on the OpenVINO graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from nncf.quantization.advanced_parameters import AdvancedAccuracyRestorerParameters
from numpy.typing import NDArray

from uad_plugins.cpu import cpu_flags, saturates
from uad_plugins.data.samples import ANOMALOUS, NORMAL, SampleTable
from uad_plugins.evaluation.metrics import image_metrics
from uad_plugins.hookspecs import QuantizationRequest, QuantizationResult
from uad_plugins.quantization.equalization import SAMPLES, equalize
from uad_plugins.quantization.export import save_onnx, save_openvino, to_onnx, to_openvino
from uad_plugins.quantization.openvino_rules import OpenvinoGraph
from uad_plugins.quantization.options import OpenvinoOptions
from uad_plugins.quantization.ranges import advanced_parameters
from uad_plugins.quantization.referee import rank_correlation
from uad_plugins.runtime.exported import FloatArray

WITHOUT_LABELS = 32
"""Held-out normal images whose maps are compared where there are no labels."""


def chosen_fix(name: str) -> str:
    """Return the overflow fix that ``auto`` means on this machine."""
    return name if name != "auto" else ("first_layer" if saturates() else "disable")


def quantize(request: QuantizationRequest) -> QuantizationResult:
    """Write ``model.xml`` and ``model.bin``."""
    options: OpenvinoOptions = request.options
    if options.equalize and request.calibration.paths:
        equalize(request.core, map(torch.from_numpy, islice(request.calibration, SAMPLES)))
    path = save_onnx(to_onnx(request.core, request.image_size), request.folder / "work" / "fp32.onnx")
    model = to_openvino(path)
    graph = OpenvinoGraph.of(model)
    fix = chosen_fix(options.overflow_fix)
    arguments: dict[str, Any] = {
        "subset_size": len(request.calibration),
        "fast_bias_correction": options.bias_correction == "fast",
        "ignored_scope": nncf.IgnoredScope(names=_left_in_float(graph)),
    }
    advanced = advanced_parameters(options.chosen_ranges(bool(request.calibration.paths)), fix)
    calibration = nncf.Dataset(request.calibration)
    details: dict[str, Any] = {"overflow_fix": fix, "cpu": cpu_flags()}
    complaints = []
    if options.max_drop is None:
        quantized = nncf.quantize(model, calibration, advanced_parameters=advanced, **arguments)
    else:
        guard = Guard(request, compile_float(model))
        quantized = nncf.quantize_with_accuracy_control(
            model,
            calibration,
            nncf.Dataset(guard.images),
            guard.measure,
            max_drop=options.max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=advanced,
            advanced_accuracy_restorer_parameters=AdvancedAccuracyRestorerParameters(
                # All of them: a part could lack a product.
                ranking_subset_size=len(guard.images),
                **({} if options.max_layers is None else {"max_num_iterations": options.max_layers}),
            ),
            **arguments,
        )
        # NNCF says nothing when it runs out of layers before the drop is small enough.
        drop = 1.0 - guard.measure(compile_float(quantized), guard.images)[0]
        details |= {**guard.record, "drop": drop}
        if drop > options.max_drop + 1e-6:
            complaints.append(f"a product loses {drop:.4f} of {guard.record['guard']}, more than {options.max_drop}")
    save_openvino(quantized, request.folder / "model.xml")
    return QuantizationResult(
        ["model.xml", "model.bin"],
        "int8",
        "openvino",
        whole=options.max_drop is None,
        details=details,
        complaints=complaints,
    )


def compile_float(model: Any) -> Any:
    """Compile an ``openvino.Model`` for this processor, with FP32 arithmetic."""
    return openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _left_in_float(graph: OpenvinoGraph) -> list[str]:
    """Return the nodes that get no quantizer: the head, gates, and residual additions.

    OpenVINO adds in float within the convolution before it: quantizing what is added would cost accuracy (maps of STFPM
    12.5 % off instead of 7.3 %) and save no time.
    """
    head = {name for name in graph.head() & graph.moving() if graph.kinds[name] != "Result"}
    return sorted(head | graph.gates() | {addition for addition, _, _ in graph.additions()})


class Guard:
    """What accuracy control measures: how much the worst category loses.

    With labelled validation images it is the drop of each category's image AUROC; without any, of the rank correlation of
    the maps of held-out normal images with those of FP32. The test split is not looked at.

    Args:
        request: Names the samples.
        model: Compiled FP32 model.

    Attributes:
        images: Normalised validation images.
        record: What it goes by, for the manifest.
    """

    def __init__(self, request: QuantizationRequest, model: Callable[[FloatArray], Any]) -> None:
        table = request.table
        indices, self.labelled = _validation(table)
        self._names = [table.categories[int(table.category_index[index])] for index in indices]
        self._labels = table.labels[indices].astype(int)
        self.images: list[FloatArray] = [request.calibration.image(table.paths[int(index)]) for index in indices]
        # NNCF measures parts of the images too, and hands them on as they are.
        self._index = {id(image): index for index, image in enumerate(self.images)}
        self._expected = [self._scored(model(image)) for image in self.images]
        self.record = {
            "guard": "image AUROC of each category" if self.labelled else "rank correlation of maps with FP32, by category",
            "validation_images": len(indices),
        }

    def measure(self, model: Any, images: Iterable[FloatArray]) -> tuple[float, None]:
        """Return 1 less the loss of the worst category.

        Args:
            model: Compiled OpenVINO model.
            images: The validation images, or some of them.
        """
        found = {self._index[id(image)]: self._scored(model(image)) for image in images}
        kept = []
        for name in sorted({self._names[index] for index in found}):
            mine = [index for index in found if self._names[index] == name]
            kept.append(self._kept([self._expected[i] for i in mine], [found[i] for i in mine], self._labels[mine]))
        return min(kept), None

    @staticmethod
    def _scored(results: Any) -> tuple[float, NDArray[np.float64]]:
        return float(results[0].reshape(())), np.asarray(results[1], np.float64).ravel()

    def _kept(
        self,
        expected: Sequence[tuple[float, NDArray[np.float64]]],
        found: Sequence[tuple[float, NDArray[np.float64]]],
        labels: NDArray[np.int_],
    ) -> float:
        if not self.labelled:
            return float(np.mean([rank_correlation(one[1], other[1]) for one, other in zip(expected, found, strict=True)]))
        before, after = (
            image_metrics(np.array([score for score, _ in scored]), labels)["image_auroc"] for scored in (expected, found)
        )
        return 1.0 if before is None or after is None else 1.0 - max(0.0, before - after)


def _validation(table: SampleTable) -> tuple[NDArray[np.int64], bool]:
    """Return the validation images: all, where each category has labelled ones; else some held-out normal ones."""
    labelled = all(len(table.where(split="val", category=c, label=ANOMALOUS)) for c in table.categories)
    if labelled:
        return table.where(split="val"), True
    normal = [table.where(split="val", category=category, label=NORMAL) for category in table.categories]
    share = max(1, WITHOUT_LABELS // max(1, len(normal)))
    return np.concatenate([indices[:share] for indices in normal]), False
