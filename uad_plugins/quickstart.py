"""The quickstart: every station once, on synthetic products, offline."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uad_plugins.config import recipe_path, resolve
from uad_plugins.data.layouts import scan
from uad_plugins.data.products.synthesis import synthesize
from uad_plugins.data.samples import ANOMALOUS
from uad_plugins.deployment.manifest import BundleManifest
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.evaluate import Evaluation, evaluate
from uad_plugins.evaluation.report import write_report
from uad_plugins.quantized import QuantizedManifest
from uad_plugins.registry import installed
from uad_plugins.runtime import Detector
from uad_plugins.training.train import train

MARK = ".uadx-quickstart"
OWN = ("data", "run", ".run.lock", ".run.pixels", "evaluation", "int8", ".int8.lock", "bundle", "report.html", MARK)
"""What a quickstart writes into its folder."""


@dataclass(frozen=True)
class Example:
    """What the bundle says of one defective test image."""

    path: str
    category: str
    score: float
    threshold: float | None
    verdict: str
    engine: str


@dataclass(frozen=True)
class Quickstart:
    """Where everything was written, and what was measured.

    ``int8``, ``bundle`` and ``example`` are None without OpenVINO, NNCF, onnx and onnxruntime.
    """

    data: Path
    run: Path
    report: Path
    evaluation: Evaluation
    seconds: dict[str, float]
    int8: QuantizedManifest | None = None
    bundle: BundleManifest | None = None
    example: Example | None = None


def run_quickstart(
    out: Path,
    *,
    overwrite: bool = False,
    epochs: int | None = None,
    side: int | None = None,
    tell: Callable[[str], None],
) -> Quickstart:
    """Make products, train one model on all of them, evaluate, quantize and deploy it, write heat maps and a report.

    Args:
        out: Folder for everything.
        overwrite: Replace the folder of an earlier quickstart.
        epochs: Other than the recipe's.
        side: Input side in pixels, other than the recipe's.
        tell: Called with a line before each step.

    Raises:
        UadxError: The folder exists.
        UsageError: A setting is wrong; nothing is deleted then.
    """
    flags: dict[str, Any] = {}
    if epochs is not None:
        flags["trainer"] = {"max_epochs": epochs}
    if side is not None:
        flags["data"] = {"image_size": side}
    # Before anything is deleted: it may be refused.
    config = resolve(file=recipe_path("quickstart"), flags=flags, environment={})
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise UadxError(f"{out}: exists and is not empty", "name a new folder with --out")
        if not overwrite:
            raise UadxError(f"{out}: holds an earlier quickstart", "replace it with --overwrite, or name another with --out")
        _discard(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, text: str) -> Iterator[None]:
        tell(text)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    data, run = out / "data", out / "run"
    int8, bundle, example = None, None, None
    quantizing = all(installed(name) for name in ("openvino", "nncf", "onnx", "onnxruntime"))
    steps = 5 if quantizing else 3
    with step(
        "synthesize", f"1/{steps}  drawing three products: good parts to learn from, good and defective ones to test on"
    ):
        synthesize(data, side=256, train=60, test=24, seed=0)
    with step("train", f"2/{steps}  training one model on all three, from images of good parts only"):
        train(config, data, run)
    with step("evaluate", f"3/{steps}  testing it on parts it has never seen"):
        with open_detector(run) as detector:
            result = evaluate(detector, scan(data), out=out / "evaluation", all_maps=True, examples=6)
        facts = {
            "model": "unified STFPM, resnet18",
            "data": "three synthetic products",
            "input": f"{config.data.size[0]} px",
        }
    if quantizing:
        from uad_plugins.deployment.deploy import Order as Deployment
        from uad_plugins.deployment.deploy import deploy
        from uad_plugins.quantization.quantize import Order, quantize

        with step("quantize", f"4/{steps}  quantizing it to INT8, tested beside FP32"):
            int8 = quantize(Order(run, out / "int8", "openvino-int8", samples=60, data=str(data)))
        with step("deploy", f"5/{steps}  deploying the INT8 model as a bundle for CPUs, run without torch"):
            bundle = deploy(Deployment(out / "int8", out / "bundle", "openvino-cpu"))
            example = _example(out / "bundle", data)
    report = write_report(
        result,
        out / "report.html",
        title="uadx quickstart",
        facts=facts,
        beside=int8.auroc if int8 is not None else None,
    )
    return Quickstart(data, run, report, result, seconds, int8, bundle, example)


def _discard(out: Path) -> None:
    """Delete what an earlier quickstart wrote; what others have put beside it stays."""
    for path in (out / name for name in OWN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _example(bundle: Path, data: Path) -> Example:
    """Judge a defective test image with the bundle, as a program at the line would."""
    table = scan(data)
    sample = table[int(table.where(split="test", label=ANOMALOUS)[0])]
    with Detector(bundle) as detector:
        found = detector.predict(sample.path, category=sample.category)
        return Example(sample.path, sample.category, found.score, found.threshold, found.verdict, detector.engine)
