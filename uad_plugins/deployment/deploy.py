"""``deploy``: from a run or a quantized model to a bundle, verified before it is called one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uad_plugins.artifacts import read_json, write_text
from uad_plugins.config import validated
from uad_plugins.deployment.bundle import Bundle, check_place, seal, staged
from uad_plugins.deployment.card import CARD, card, draw
from uad_plugins.deployment.manifest import BundleManifest, InputSpec, OutputNames, PreprocessingSpec, ThresholdSet
from uad_plugins.deployment.sources import Source, open_source
from uad_plugins.deployment.verify import images_for, verify
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.hookspecs import PackagingRequest, PackagingResult, TargetPlugin
from uad_plugins.registry import installed, registry, require_installed
from uad_plugins.training.quiet import quiet_libraries

SCORE = {
    "normalisation": "none",
    "score": "not bounded, higher is more anomalous; its meaning lies in its relation to the threshold",
    "map": "not bounded; the same scale as the score",
}


@dataclass(frozen=True)
class Order:
    """What is to be deployed, and how.

    Attributes:
        source: A run or a quantized model.
        out: Folder for the bundle, or a file ending in ``.zip``.
        target: Name of a target plugin.
        precision: Of a run: ``fp32`` (None) or ``fp16``.
        data: Where the run's data is now, for verification and example pictures.
        options: Of the target, as given.
        pictures: Put examples into the model card.
        build_engine: Build TensorRT's engine here too.
        overwrite: Replace a bundle that is there.
    """

    source: Path
    out: Path
    target: str
    precision: str | None = None
    data: str | None = None
    options: Mapping[str, Any] | None = None
    pictures: bool = True
    build_engine: bool = False
    overwrite: bool = False


def deploy(order: Order, tell: Callable[[str], None] = lambda _: None) -> BundleManifest:
    """Write a bundle.

    Args:
        order: What and how.
        tell: Called with a line before each step.

    Returns:
        The manifest written.

    Raises:
        UadxError: The source cannot be packaged for the target, or the bundle does not say what the source says; nothing is
            left behind then.
        UsageError: Unknown target or option.
    """
    plugin: TargetPlugin = registry().get("target", order.target)
    options = validated(plugin.options, order.options or {})
    out = order.out.expanduser().absolute()
    check_place(out, overwrite=order.overwrite)
    if order.build_engine:
        _check_engine(order, out)
    require_installed(plugin)
    with (
        quiet_libraries(),
        tempfile.TemporaryDirectory(prefix="uadx-deploy-") as work,
        staged(out, overwrite=order.overwrite) as folder,
    ):
        source = open_source(order.source.expanduser().absolute(), order.precision, Path(work))
        tell(f"packaging {order.source} for {order.target}")
        with source.reference:
            result = plugin.package(_request(source, options, folder))
            _refuse(plugin, result)
            for line in result.notes:
                tell(line)
            manifest = _manifest(plugin, source, result, options.model_dump(mode="json"))
            manifest = _finish(order, source, result, manifest, folder, out.stem, tell)
        if order.build_engine:
            tell("building the engine: minutes")
            tell(f"the same with trtexec, in {order.out}: {_build_engine(folder)}")
    return manifest


def _request(source: Source, options: Any, folder: Path) -> PackagingRequest:
    return PackagingRequest(
        models=source.models,
        image_size=source.reference.image_size,
        mean=source.mean,
        std=source.std,
        precision=source.precision,
        profile=source.profile,
        whole=source.whole,
        options=options,
        folder=folder,
    )


def _refuse(plugin: TargetPlugin, result: PackagingResult) -> None:
    wrong = [f"{rule}: {case}" for rule, cases in result.checks.items() for case in cases]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UadxError(
            f"the model does not keep the rules of {plugin.name}: {'; '.join(wrong[:3])}{more}",
            "quantize it for this target; see docs/deployment.md",
        )


def _manifest(plugin: TargetPlugin, source: Source, result: PackagingResult, options: dict[str, Any]) -> BundleManifest:
    height, width = source.reference.image_size
    split = source.split
    return BundleManifest.model_validate(
        {
            "target": plugin.name,
            "model": source.model,
            "categories": source.reference.categories,
            "precision": source.precision,
            "profile": source.profile,
            "onnx": result.onnx,
            "openvino": result.openvino,
            "input": InputSpec(
                name=result.input_name,
                shape=(1, height, width, 3) if result.pixels else (1, 3, height, width),
                dtype="uint8" if result.pixels else "float32",
                layout="NHWC" if result.pixels else "NCHW",
            ),
            "outputs": OutputNames(score=result.outputs[0], map=result.outputs[1]),
            "preprocessing": PreprocessingSpec(
                mean=source.mean, std=source.std, normalised_by="graph" if result.pixels else "caller"
            ),
            "score": SCORE,
            "thresholds": ThresholdSet.of(source.thresholds),
            "calibration": source.calibration,
            "metrics": source.metrics,
            "weights": source.weights,
            # Names alone: the folders of this machine are nobody's business where the bundle goes.
            "source": {
                "kind": source.kind,
                "name": source.folder.name,
                "run": Path(str(split.get("run"))).name,
                "checkpoint_sha256": split.get("checkpoint_sha256"),
                "layout": split.get("layout"),
                "seed": split.get("seed"),
                "val_fraction": split.get("val_fraction"),
            },
            "checks": result.checks,
            "details": {**result.details, **({"options": options} if options else {})},
            "files": {},
        }
    )


def _finish(
    order: Order,
    source: Source,
    result: PackagingResult,
    manifest: BundleManifest,
    folder: Path,
    name: str,
    tell: Callable[[str], None],
) -> BundleManifest:
    """Verify what was packaged, add the model card, and seal it."""
    table = source.table(order.data)
    images, kind = images_for(table, manifest.categories, manifest.image_size)
    tell(f"verifying the bundle on {len(images)} {kind}")
    seal(folder, manifest)
    verified = verify(folder, source.reference, source.precision, images, tell)
    metrics = {**manifest.metrics, "verified": verified, "verified_on": kind}
    manifest = manifest.model_copy(update={"metrics": metrics})
    pictures = draw(source.reference, table, folder) if order.pictures and table is not None else []
    write_text(folder / CARD, card(manifest, result.usage, pictures, name))
    manifest = seal(folder, manifest)
    Bundle.open(folder)
    return manifest


def _check_engine(order: Order, out: Path) -> None:
    """Refuse what cannot be built before anything is done."""
    if order.target != "tensorrt-jetson":
        raise UsageError("--build-engine is for --target tensorrt-jetson", "leave it out")
    if out.suffix.lower() == ".zip":
        raise UsageError("an engine belongs to this machine: it is not put into a zip", "name a folder")
    missing = [name for name in ("tensorrt", "pycuda") if not installed(name)]
    if missing:
        raise UadxError(
            f"--build-engine needs {' and '.join(missing)} and an NVIDIA GPU",
            "build it on the device: python3 runner.py build",
        )


def _build_engine(folder: Path) -> str:
    """Build the engine with the runner that was packaged, into the bundle; returns the equal ``trtexec`` line."""
    done = subprocess.run([sys.executable, str(folder / "runner.py"), "build"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UadxError(
            f"TensorRT could not build the engine: {lines[-1]}", "deploy without --build-engine, build on the device"
        )
    return str(read_json(folder / "engine" / "model.engine.json")["trtexec"])
