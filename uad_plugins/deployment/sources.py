"""What can be deployed: a trained run or a quantized model, opened as the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uad_plugins.artifacts import MANIFEST as RUN_MANIFEST
from uad_plugins.artifacts import Run, read_json
from uad_plugins.config import model_plugin
from uad_plugins.data.layouts import scan, usual_layout
from uad_plugins.data.samples import SampleTable, split_again
from uad_plugins.detector import Detector, open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.evaluation.record import kept
from uad_plugins.evaluation.thresholds import Thresholds
from uad_plugins.models.backbones import with_licence
from uad_plugins.models.torch_detector import TorchDetector
from uad_plugins.quantization.core import build_core, preprocessing_of
from uad_plugins.quantization.float_backends import write
from uad_plugins.quantization.quiet import quiet_quantizers
from uad_plugins.quantized import MANIFEST as QUANTIZED_MANIFEST
from uad_plugins.quantized import Quantized

LOST = {"licence": "unknown: the run that it was quantized from is not there, and its record names none"}


@dataclass(frozen=True)
class Source:
    """A model that can be packaged.

    Attributes:
        folder: Where it lies.
        kind: ``run`` or ``quantized``.
        reference: What the bundle has to agree with.
        models: Exported model by format, see ``PackagingRequest``.
        model: Method.
        mean: Of the RGB channels of images in 0..1.
        std: The same.
        precision: ``int8``, ``fp16`` or ``fp32``.
        profile: Rules that a quantized graph follows.
        whole: Every convolution is quantized.
        split: Where its data lay and how it was split (``Run.source``).
        calibration: What it was calibrated on.
        metrics: What was measured of it.
        weights: Origin and licence of the backbone's weights.
    """

    folder: Path
    kind: str
    reference: Detector
    models: dict[str, Path]
    model: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    profile: str
    whole: bool
    split: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)

    @property
    def thresholds(self) -> Thresholds:
        """Decision thresholds."""
        return self.reference.thresholds

    def table(self, data: str | None = None) -> SampleTable | None:
        """Return its data with the splits of the training; None when it cannot be reached.

        Args:
            data: Where it lies now.

        Raises:
            UadxError: ``data`` was given and holds no data set.
        """
        root = data or str(self.split.get("data"))
        if data is None and not Path(root).exists():
            return None
        try:
            found = scan(root, usual_layout(root, self.split), self.split.get("categories"))
            return split_again(found, self.split)
        except UadxError:
            if data is not None:
                raise
            return None


def open_source(folder: Path, precision: str | None, work: Path) -> Source:
    """Open a run or a quantized model.

    Args:
        folder: Where it lies.
        precision: Of a run: ``fp32`` (None) or ``fp16``.
        work: Folder that a run is exported to.

    Raises:
        UadxError: It is neither, unfinished, rejected or damaged, or cannot be exported.
        UsageError: A precision that it does not have.
    """
    if (folder / QUANTIZED_MANIFEST).is_file():
        if precision is not None:
            raise UsageError("--precision is for runs: a quantized model has its own", "leave it out")
        return _quantized(folder)
    if (folder / RUN_MANIFEST).is_file():
        return _run(folder, precision or "fp32", work)
    if not folder.exists():
        raise UadxError(f"{folder}: no such file or folder", "give a run or a quantized model")
    raise UadxError(f"{folder}: neither a run nor a quantized model", "give what 'uadx train' or 'uadx quantize' wrote")


def _run(folder: Path, precision: str, work: Path) -> Source:
    run = Run.open(folder)
    config = run.config()
    if "export" not in model_plugin(config.model.name).supports:
        raise UsageError(f"{config.model.name} cannot be exported", "see 'uadx plugins list'")
    with quiet_quantizers():
        reference = TorchDetector.open(folder, "cpu")
        facts = preprocessing_of(reference.model, reference.image_size)
        # The core shares the module's weights, and the reference needs them where they are.
        module = model_plugin(config.model.name).load(run.checkpoint, config)
        result = write(build_core(module, reference.image_size), reference.image_size, work, half=precision == "fp16")
    return Source(
        folder=folder,
        kind="run",
        reference=reference,
        models=_models(work, dict.fromkeys(result.files)),
        model=config.model.name,
        mean=facts.mean,
        std=facts.std,
        precision=precision,
        profile="float",
        whole=False,
        split=run.source(),
        metrics={**_training(run), **_evaluation(folder)},
        weights=with_licence(run.manifest().weights),
    )


def _quantized(folder: Path) -> Source:
    station = Quantized.open(folder)
    manifest = station.manifest()
    station.check_files(manifest)
    metrics = {"agreement_with_fp32": manifest.agreement, "auroc": manifest.auroc, "size": manifest.size}
    run = Run(Path(str(manifest.source.get("run"))))
    known = (run.folder / RUN_MANIFEST).is_file()
    return Source(
        folder=folder,
        kind="quantized",
        reference=open_detector(folder),
        models=_models(folder, manifest.files),
        model=manifest.model,
        mean=manifest.mean,
        std=manifest.std,
        precision=manifest.precision,
        profile=manifest.profile,
        whole=manifest.profile != "float" and manifest.whole,
        split=manifest.source,
        calibration=manifest.calibration if manifest.profile != "float" else {},
        metrics={
            **(_training(run) if known else {}),
            "quantization": {k: v for k, v in metrics.items() if v},
            **_evaluation(folder),
        },
        weights=_weights(manifest.source, run if known else None),
    )


def _models(folder: Path, files: Mapping[str, Any]) -> dict[str, Path]:
    names = {"onnx": "model.onnx", "openvino": "model.xml"}
    return {kind: folder / name for kind, name in names.items() if name in files}


def _training(run: Run) -> dict[str, Any]:
    return {"training": read_json(run.metrics_file)} if run.metrics_file.is_file() else {}


def _evaluation(folder: Path) -> dict[str, Any]:
    """Return what the source was last measured at; a bundle names the data, and says nothing of where it lies."""
    measured = kept(folder)
    return {"evaluation": {**measured, "data": Path(measured["data"]).name}} if measured else {}


def _weights(source: Mapping[str, Any], run: Run | None) -> dict[str, Any]:
    """Return origin and licence of the backbone's weights: as the quantized model noted them, else as its run says."""
    if "weights" in source:
        return dict(source["weights"])
    return with_licence(run.manifest().weights) if run is not None else dict(LOST)
