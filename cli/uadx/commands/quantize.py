"""``uadx quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uad_plugins.config import from_assignments
from uad_plugins.errors import UsageError, missing_extra
from uad_plugins.quantized import MANIFEST
from uadx.output import command, emit_json, note, say, table


def quantize(
    run: Annotated[Path, typer.Argument(help="Trained run.", metavar="RUN")],
    backend: Annotated[str, typer.Option("--backend", help="What quantizes it: see 'uadx plugins list'.")] = "openvino-int8",
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write the quantized model to.", metavar="Q")] = None,
    calibration: Annotated[
        str, typer.Option("--calibration", help="dataset (training images), random-normal (noise) or mixed.")
    ] = "dataset",
    samples: Annotated[int, typer.Option("--samples", help="Calibration samples.")] = 300,
    noise_std: Annotated[
        float, typer.Option("--noise-std", help="Standard deviation of the noise of random-normal and mixed.")
    ] = 1.0,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Where the run's data is now; with a labelled test split FP32 and the result are measured side by side.",
            metavar="DATA",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set one option of the backend.", metavar="OPTION=VALUE")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Accuracy control: most that any product may lose (openvino-int8).")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training images (nncf-qat).")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of noise, choice of images and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Turn a trained run into an INT8 (or FP16) model that later commands read like a run.

    The result is audited, compared with FP32 on held-out images of good parts, and gets thresholds of its own.
    """
    if out is None:
        raise UsageError("no folder to write the quantized model to", "add --out Q")
    options: dict[str, Any] = from_assignments(set_ or [])
    options |= {name: value for name, value in (("max_drop", max_drop), ("epochs", epochs)) if value is not None}
    try:
        from uad_plugins.quantization.quantize import Order
        from uad_plugins.quantization.quantize import quantize as run_quantization
    except ModuleNotFoundError as error:
        raise missing_extra("quantizing", "all", error) from error
    order = Order(
        run=run,
        out=out,
        backend=backend,
        calibration=calibration,
        samples=samples,
        data=data,
        options=options,
        seed=seed,
        noise_std=noise_std,
        resume=resume,
        overwrite=overwrite,
    )
    manifest = run_quantization(order, note)
    if as_json:
        emit_json({"out": str(out), **manifest.model_dump(by_alias=True)})
        return
    if manifest.auroc is not None:
        rows = [
            [name, metric.replace("_", " "), *(f"{values[key]:.4f}" for key in ("fp32", "quantized", "drop"))]
            for name, metrics in manifest.auroc.items()
            for metric, values in metrics.items()
        ]
        table(["category", "metric", "FP32", manifest.precision.upper(), "drop"], rows)
    # A backend may say what it likes of its calibration.
    asked, left_out = manifest.calibration.get("asked"), len(manifest.calibration.get("left_out", ()))
    found = manifest.calibration.get("samples", 0) + left_out
    if asked is not None and found < asked:
        note(f"note: {asked} calibration samples were asked for, there are images for {found}")
    if left_out:
        note(f"note: {left_out} odd images were left out of the calibration; see calibration.left_out in {out / MANIFEST}")
    for kind, size in manifest.size.items():
        say(f"{kind}: {size['before'] / 1e6:.2f} MB -> {size['after'] / 1e6:.2f} MB ({size['ratio']:.2f} of FP32)")
        if not size["small"]:
            why = "weights are stored as float, see the option 'weights'" if size["ratio"] > 0.5 else "the network is small"
            note(f"note: {manifest.precision} and yet {size['ratio']:.2f} of FP32: {why}")
    first = next(iter(manifest.agreement.values()))
    say(
        f"{out}: {manifest.precision}, audit passed; maps differ from FP32 by {100 * first['map_l2']:.1f} % "
        f"(rank correlation {first['map_rank']:.3f}) on {first['images']} held-out images"
    )
    note(f"next: {command('evaluate', out)} DATA")
