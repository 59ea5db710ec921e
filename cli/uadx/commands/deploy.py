"""``uadx deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uad_plugins.config import from_assignments
from uad_plugins.errors import UsageError, missing_extra
from uadx.output import command, emit_json, note, say


def deploy(
    source: Annotated[Path, typer.Argument(help="Trained run or quantized model.", metavar="RUN|QUANTIZED")],
    target: Annotated[
        str, typer.Option("--target", help="What it is packaged for: see 'uadx plugins list'.")
    ] = "openvino-cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write the bundle to, or a file ending in .zip.", metavar="BUNDLE")
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="Weights of a run: fp32 or fp16.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Where the run's data is now, for verification and example pictures.", metavar="DATA"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set one option of the target.", metavar="OPTION=VALUE")
    ] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="No example images in the model card.")] = False,
    build_engine: Annotated[
        bool, typer.Option("--build-engine", help="Build TensorRT's engine here too (tensorrt-jetson).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Package a run or a quantized model as a bundle, which runs without torch.

    The bundle is verified against its source on a few images before it is written.
    """
    if out is None:
        raise UsageError("no place to write the bundle to", "add --out BUNDLE")
    if precision not in {None, "fp32", "fp16"}:
        raise UsageError(f"unknown precision '{precision}'", "fp32 or fp16; for int8 quantize first: uadx quantize")
    try:
        from uad_plugins.deployment.deploy import Order
        from uad_plugins.deployment.deploy import deploy as run_deployment
    except ModuleNotFoundError as error:
        raise missing_extra("deploying", "all", error) from error
    order = Order(
        source=source,
        out=out,
        target=target,
        precision=precision,
        data=data,
        options=from_assignments(set_ or []),
        pictures=not no_pictures,
        build_engine=build_engine,
        overwrite=overwrite,
    )
    manifest = run_deployment(order, note)
    if as_json:
        emit_json({"out": str(out), **manifest.model_dump(by_alias=True)})
        return
    size = sum(file.bytes for file in manifest.files.values())
    for engine, agreement in manifest.metrics["verified"].items():
        say(
            f"{engine}: maps differ from the source by {100 * agreement['map_l2']:.2g} %, scores by "
            f"{100 * agreement['score_l2']:.2g} % ({agreement['images']} {manifest.metrics['verified_on']})"
        )
    if manifest.checks:
        say(f"{target}: {len(manifest.checks)} rules checked, all kept")
    say(f"{out}: {manifest.precision} for {target}, {size / 1e6:.1f} MB, verified")
    note(f"next: {command('predict', out)} IMAGES")
