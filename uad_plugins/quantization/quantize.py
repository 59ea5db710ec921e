"""``quantize``: from a trained run to a quantized model on disk, judged before it is called one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from uad_plugins.artifacts import Run, checked, sha256_of, write_json
from uad_plugins.config import model_plugin, ratio_scale, validated
from uad_plugins.data.layouts import usual_layout
from uad_plugins.data.samples import ANOMALOUS, SampleTable
from uad_plugins.detector import Detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.evaluation.evaluate import evaluate
from uad_plugins.evaluation.thresholds import NO_THRESHOLDS, NORMAL_FPR, thresholds_from_samples
from uad_plugins.hookspecs import QuantizationRequest, QuantizationResult, QuantizerPlugin
from uad_plugins.models.backbones import with_licence
from uad_plugins.models.torch_detector import TorchDetector
from uad_plugins.quantization import audit as auditing
from uad_plugins.quantization.calibration import Calibration, calibrate
from uad_plugins.quantization.core import build_core, preprocessing_of
from uad_plugins.quantization.export import save_onnx, save_openvino, to_onnx, to_openvino
from uad_plugins.quantization.onnx_graph import with_int8_weights
from uad_plugins.quantization.outliers import without_outliers
from uad_plugins.quantization.quiet import quiet_quantizers
from uad_plugins.quantization.referee import AGAINST_FP32, ENGINES, TRAINED, compare, held_out
from uad_plugins.quantization.samples import samples_of
from uad_plugins.quantized import MANIFEST, Quantized, QuantizedManifest
from uad_plugins.registry import installed, registry, require_installed
from uad_plugins.training.quiet import quiet_libraries
from uad_plugins.training.run_folder import discard, locked, own_place

REFEREE_IMAGES = 24
SIZE_LIMIT = {"int8": 0.27, "fp16": 0.55, "fp32": 1.01}
"""Share of the FP32 file that a model file may take; more is said, and no reason to reject."""
WIDEST_NOISE = 4.0
"""Largest standard deviation of noise that is advised."""


@dataclass(frozen=True)
class Order:
    """What is to be quantized, and how.

    Attributes:
        run: The trained run.
        out: Folder for the result.
        backend: Name of a quantizer plugin.
        calibration: ``dataset``, ``random-normal`` or ``mixed``.
        samples: Calibration images.
        data: Data to take images from; None takes what the run was trained on. With one given that has a labelled test
            split, the image AUROC of FP32 and of the result are compared.
        options: Of the backend, as given.
        seed: Of everything random.
        noise_std: Standard deviation of the noise that calibrates.
        resume: Continue what a killed call has begun.
        overwrite: Replace what is there.
    """

    run: Path
    out: Path
    backend: str
    calibration: str = "dataset"
    samples: int = 300
    data: str | None = None
    options: Mapping[str, Any] | None = None
    seed: int = 0
    noise_std: float = 1.0
    resume: bool = False
    overwrite: bool = False


def quantize(order: Order, tell: Callable[[str], None] = lambda _: None) -> QuantizedManifest:
    """Quantize a run.

    Args:
        order: What and how.
        tell: Called with a line before each step.

    Returns:
        The manifest written.

    Raises:
        UadxError: Run, data or folder do not allow it; or the result failed its audit or disagrees with FP32, and was
            written as ``rejected``.
        UsageError: Unknown backend, option, or calibration source.
    """
    plugin: QuantizerPlugin = registry().get("quantizer", order.backend)
    options = validated(plugin.options, order.options or {})
    run = Run.open(order.run)
    config = run.config()
    supported = model_plugin(config.model.name).supports
    if not plugin.supports <= supported:
        raise UsageError(
            f"{config.model.name} cannot be quantized by {order.backend}",
            f"it does not support {', '.join(sorted(plugin.supports - supported))}; see 'uadx plugins list'",
        )
    require_installed(plugin)
    station = Quantized(own_place(order.out))
    with locked(station.folder), quiet_libraries():
        _check_folder(station, order)
        table = samples_of(run, order.data, tell)
        with quiet_quantizers():
            reference = TorchDetector.open(run.folder, "cpu")
            facts = preprocessing_of(reference.model, reference.image_size)
        calibration = calibrate(
            order.calibration,
            order.samples,
            table,
            reference.categories,
            image_size=reference.image_size,
            mean=facts.mean,
            std=facts.std,
            seed=order.seed,
            noise_std=order.noise_std,
            needed=plugin.calibrated if isinstance(plugin.calibrated, bool) else plugin.calibrated(options),
        )
        judged_on = held_out(table, reference.categories, REFEREE_IMAGES)
        manifest = QuantizedManifest(
            model=config.model.name,
            categories=reference.categories,
            image_size=reference.image_size,
            mean=facts.mean,
            std=facts.std,
            backend=order.backend,
            options=options.model_dump(mode="json"),
            calibration=calibration.record,
            source=source_of(run, order.data),
        )
        _begin(station, manifest, order)
        with quiet_quantizers():
            module = checked(run.checkpoint, lambda path: model_plugin(config.model.name).load(path, config))
            core = build_core(module, reference.image_size)
            calibration = without_outliers(core, calibration, table)
            manifest = manifest.model_copy(update={"calibration": calibration.record})
            tell(f"quantizing with {order.backend}, {_taken(calibration)}")
            request = QuantizationRequest(
                run=run,
                config=config,
                module=module,
                core=core,
                image_size=reference.image_size,
                calibration=calibration,
                table=table,
                options=options,
                folder=station.folder,
                seed=order.seed,
                resume=order.resume,
            )
            result = plugin.quantize(request)
        tell("auditing the result, and comparing it with FP32 on held-out images")
        return _judge(station, manifest, request, result, reference, judged_on, labelled=order.data is not None)


def _taken(calibration: Calibration) -> str:
    """Return in words what calibrates."""
    if not len(calibration):
        return "no calibration"
    odd = len(calibration.record["left_out"])
    rest = f", without {odd} images whose activations reach far beyond those of the others" if odd else ""
    return f"{len(calibration)} calibration samples ({calibration.source}){rest}"


def source_of(run: Run, data: str | None) -> dict[str, Any]:
    """Return where the result comes from; the data is where it lies now, and the licence travels along."""
    source = {**run.source(), "weights": with_licence(run.manifest().weights)}
    if data is None:
        return source
    return {**source, "data": str(Path(data).expanduser().absolute()), "layout": usual_layout(data, source)}


def _check_folder(station: Quantized, order: Order) -> None:
    """Decide whether the folder may be written to; nothing is changed yet."""
    if order.resume and order.overwrite:
        raise UsageError("--resume and --overwrite contradict each other", "give one of them")
    folder = station.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise UadxError(f"{folder}: is a file", "name a folder for the result")
    if not (folder / MANIFEST).is_file():
        raise UadxError(f"{folder}: is not empty and holds no quantized model", "name a new folder")
    if order.overwrite:
        return
    manifest = station.manifest()
    if manifest.status != "quantizing":
        raise UadxError(
            f"{folder}: holds a {manifest.status} quantized model", "name a new folder, or replace it with --overwrite"
        )
    if not order.resume:
        raise UadxError(f"{folder}: holds an unfinished one", "continue it with --resume, or replace it with --overwrite")


def _begin(station: Quantized, manifest: QuantizedManifest, order: Order) -> None:
    """Make the folder ready; a resumed call has to be the one that was begun."""
    begun = order.resume and (station.folder / MANIFEST).is_file()
    if begun:
        before = station.manifest()
        for name in ("backend", "options", "calibration"):
            if getattr(before, name) != getattr(manifest, name):
                raise UsageError(f"a resumed call keeps its settings: {name} differs", "give the same flags, or --overwrite")
        if before.source["checkpoint_sha256"] != manifest.source["checkpoint_sha256"]:
            raise UadxError("the run is not the one that this was begun from", "start anew with --overwrite")
    else:
        discard(station.folder)
    station.folder.mkdir(parents=True, exist_ok=True)
    for leftover in station.folder.rglob(".*.part"):
        leftover.unlink()
    station.write_manifest(manifest)


def _judge(
    station: Quantized,
    manifest: QuantizedManifest,
    request: QuantizationRequest,
    result: QuantizationResult,
    reference: Detector,
    judged_on: list[str],
    *,
    labelled: bool,
) -> QuantizedManifest:
    """Audit, compare, set thresholds, measure, and write the manifest; reject what is not good."""
    folder = station.folder
    missing = [name for name in result.files if not (folder / name).is_file()]
    if missing or not {"model.onnx", "model.xml"} & set(result.files):
        complaints = [f"{name} was not written" for name in missing] or ["neither model.onnx nor model.xml was written"]
        station.write_manifest(manifest.model_copy(update={"status": "rejected"}))
        raise UadxError(f"the result is not good: {'; '.join(complaints)}", "report it to the author of the backend")
    manifest = manifest.model_copy(
        update={
            "precision": result.precision,
            "profile": result.profile,
            "whole": result.whole,
            "details": result.details,
            "calibration": manifest.calibration if result.calibration is None else result.calibration,
            "files": {
                name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in result.files
            },
        }
    )
    findings = auditing.audit(folder, result)
    complaints = [*result.complaints, *auditing.wrong(findings)]
    candidates = engines(folder, manifest)
    judges = judging(list(candidates), manifest.profile)
    agreements: dict[str, Any] = {}
    ratio = ratio_scale(manifest.model)
    for name, candidate in candidates.items():
        agreement = compare(reference, candidate, judged_on, ratio_scale=ratio)
        agreements[name] = agreement.as_dict()
        limits = TRAINED if result.trained else AGAINST_FP32[result.precision]
        complaints += [f"{name} against FP32: {line}" for line in agreement.wrong(limits)] if name in judges else []
    names = list(candidates)
    for name in names[1:]:
        agreement = compare(candidates[names[0]], candidates[name], judged_on)
        agreements[f"{names[0]} and {name}"] = agreement.as_dict()
        if name in judges:
            complaints += [f"{names[0]} against {name}: {line}" for line in agreement.wrong(ENGINES)]
    detector = candidates[names[0]]
    size = _sizes(request, manifest)
    manifest = manifest.model_copy(
        update={
            "audit": findings,
            "placement": auditing.placements(folder, result),
            "agreement": agreements,
            "size": size,
        }
    )
    if complaints:
        station.write_manifest(manifest.model_copy(update={"status": "rejected"}))
        raise UadxError(f"the result is not good: {'; '.join(complaints)}", _advice(manifest))
    thresholds = thresholds_from_samples(
        detector,
        request.table,
        request.table.where(split="val"),
        method=NORMAL_FPR,
        target_fpr=float(manifest.source["target_fpr"]),
        kind="held out from training",
        ratio_scale=ratio,
    )
    write_json(station.thresholds_file, thresholds.as_dict())
    if labelled and len(request.table.where(split="test", label=ANOMALOUS)):
        manifest = manifest.model_copy(update={"auroc": _auroc(reference, detector, request.table)})
    shutil.rmtree(folder / "work", ignore_errors=True)
    manifest = manifest.model_copy(update={"status": "finished"})
    # Last of all: from here on it is one.
    station.write_manifest(manifest)
    return manifest


def engines(folder: Path, manifest: QuantizedManifest) -> dict[str, Detector]:
    """Return a detector for each file and engine; the one that thresholds and AUROC come from is the first."""
    from uad_plugins.runtime.onnxruntime_detector import OnnxRuntimeDetector

    found: dict[str, Detector] = {}
    if installed("openvino"):
        from uad_plugins.runtime.openvino_detector import OpenVinoDetector

        for file in ("model.xml", "model.onnx"):
            if file in manifest.files:
                found[f"openvino {file}"] = OpenVinoDetector(folder / file, manifest, NO_THRESHOLDS, str(folder))
    if "model.onnx" in manifest.files:
        found["onnxruntime model.onnx"] = OnnxRuntimeDetector(
            folder / "model.onnx", manifest, NO_THRESHOLDS, str(folder), literal=True
        )
    judges = judging(list(found), manifest.profile)
    return {name: found[name] for name in [*judges, *(name for name in found if name not in judges)]}


def judging(names: Sequence[str], profile: str) -> list[str]:
    """Return the engines whose disagreement rejects a result; what the others say is recorded.

    A graph for TensorRT is judged by ONNX Runtime, node by node: it has no reserve for the 8-bit sums of processors without
    VNNI, which saturate in OpenVINO and not on the device that it is for.
    """
    literal = [name for name in names if name.startswith("onnxruntime")]
    return literal if profile == "tensorrt" and literal else list(names)


def _sizes(request: QuantizationRequest, manifest: QuantizedManifest) -> dict[str, Any]:
    """Return bytes before and after for each format: the float model is exported the same way.

    ``engine`` are the bytes that the graph takes with the INT8 weights of an engine, where the file stores them as float.
    """
    work = request.folder / "work"
    work.mkdir(exist_ok=True)
    with quiet_quantizers():
        module = model_plugin(request.config.model.name).load(request.run.checkpoint, request.config)
        path = save_onnx(to_onnx(build_core(module, request.image_size), request.image_size), work / "float.onnx")
        before = {"onnx": path.stat().st_size}
        if "model.xml" in manifest.files:
            xml = save_openvino(to_openvino(path), work / "float.xml")
            before["openvino"] = xml.stat().st_size + xml.with_suffix(".bin").stat().st_size
    sizes = {name: int(facts["bytes"]) for name, facts in manifest.files.items()}
    after = {"onnx": sizes.get("model.onnx", 0), "openvino": sizes.get("model.xml", 0) + sizes.get("model.bin", 0)}
    if manifest.profile == "tensorrt":
        stored = len(with_int8_weights(onnx.load(request.folder / "model.onnx")).SerializeToString())
        if stored < 0.99 * after["onnx"]:
            # The file holds floats for old parsers, what an engine makes of it does not.
            before["engine"], after["engine"] = before["onnx"], stored
    return {
        kind: {
            "before": before[kind],
            "after": after[kind],
            "ratio": round(after[kind] / before[kind], 4),
            "small": after[kind] / before[kind] <= SIZE_LIMIT[manifest.precision],
        }
        for kind in before
        if after[kind]
    }


def _auroc(reference: Detector, detector: Detector, table: SampleTable) -> dict[str, Any]:
    """Measure FP32 and the result on the labelled test split, by category."""
    before, after = (evaluate(item, table).report for item in (reference, detector))
    rows = [*before["categories"], "mean"]
    found: dict[str, Any] = {}
    for row in rows:
        old, new = (report["mean"] if row == "mean" else report["categories"][row] for report in (before, after))
        found[row] = {
            metric: {"fp32": old[metric], "quantized": new[metric], "drop": old[metric] - new[metric]}
            for metric in ("image_auroc", "pixel_auroc")
            if old[metric] is not None and new[metric] is not None
        }
    return found


def _advice(manifest: QuantizedManifest) -> str:
    """Say what to try, of what there is for the backend and the method."""
    tries = []
    options, trainable = manifest.options, "qat" in model_plugin(manifest.model).supports
    if manifest.precision == "int8" and manifest.calibration.get("source", "dataset") != "dataset":
        tries.append("--calibration dataset")
        wider = 2 * (manifest.calibration.get("noise_std") or WIDEST_NOISE)
        tries += [f"--noise-std {wider:g}"] if wider <= WIDEST_NOISE else []
    if options.get("bias_correction") == "fast" and not options.get("source"):
        tries.append("--set bias_correction=full")
    if manifest.backend == "openvino-int8":
        tries += ["--set overflow_fix=enable"] if options["overflow_fix"] != "enable" else []
        if options["max_drop"] is None:
            tries.append("--max-drop 0.005")
        elif manifest.details["drop"] > options["max_drop"]:
            tries += ["a higher --max-drop"] + ([] if options["max_layers"] is None else ["more --set max_layers"])
        tries += ["--backend nncf-qat"] if trainable else []
    elif manifest.backend == "tensorrt-int8" and options["source"] is None and trainable:
        tries.append("--backend nncf-qat --set profile=tensorrt")
    elif manifest.backend == "nncf-qat" or manifest.details.get("source"):
        tries.append("nncf-qat with a lower --set lr")
    return f"the files are kept for looking at, marked as rejected; try {', '.join(tries or ['--backend fp32'])}"
