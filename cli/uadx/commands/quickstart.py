"""``uadx quickstart``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from uad_plugins.errors import missing_extra
from uadx.output import emit_json, note, program, say, table


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything.", metavar="DIR")] = Path("uadx-quickstart"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier quickstart.")] = False,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training images.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", min=32, help="Input side in pixels.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Do it all once, offline, in minutes: synthetic products, one model for all of them, a report, INT8, a bundle."""
    try:
        from uad_plugins.evaluation.report import HEADINGS, figure
        from uad_plugins.evaluation.rows import describe
        from uad_plugins.quickstart import run_quickstart
    except ModuleNotFoundError as error:
        raise missing_extra("the quickstart", "train", error) from error
    out = out.expanduser()
    result = run_quickstart(out, overwrite=overwrite, epochs=epochs, side=image_size, tell=note)
    report = result.evaluation.report
    if as_json:
        facts = {"out": str(out), "report": str(result.report), "seconds": result.seconds, **report}
        for name, manifest in (("int8", result.int8), ("bundle", result.bundle)):
            facts[name] = manifest.model_dump(by_alias=True) if manifest is not None else None
        emit_json({**facts, "example": asdict(result.example) if result.example is not None else None})
        return
    rows = [[n, *(figure(v[m]) for m in HEADINGS)] for n, v in [*report["categories"].items(), ("mean", report["mean"])]]
    table(["product", *HEADINGS.values()], rows)
    if result.int8 is not None and result.int8.auroc is not None:
        mean = result.int8.auroc["mean"]["image_auroc"]
        ratio = result.int8.size["openvino"]["ratio"]
        say(f"INT8       mean image AUROC {mean['quantized']:.3f} (FP32 {mean['fp32']:.3f}), {ratio:.2f} of the size")
    say(f"report     {result.report}")
    say(f"heat maps  {out / 'evaluation' / 'maps'}")
    say(f"run        {result.run}")
    if result.bundle is not None and result.example is not None:
        size, shown = sum(file.bytes for file in result.bundle.files.values()), result.example
        agreement = result.bundle.metrics["verified"][shown.engine]
        say(
            f"bundle     {out / 'bundle'}: {result.bundle.precision} for {result.bundle.target}, {size / 1e6:.1f} MB; "
            f"its scores differ from the quantized model's by {100 * agreement['score_l2']:.2g} %"
        )
        image = os.path.relpath(shown.path, result.data)
        say(f"example    {image}: {describe(shown.score, shown.threshold)}: {shown.verdict} ({shown.engine}, without torch)")
    say("")
    say("next, on images of your own (CATEGORY/train/good, CATEGORY/test/good, CATEGORY/test/DEFECT):")
    uadx = program()
    say(f"  {uadx} data check DATA")
    say(f"  {uadx} train DATA --config stfpm_short --weights bundled --image-size 128 --epochs 30 --out RUN")
    say(f"  {uadx} evaluate RUN DATA --out EVALUATION")
    say(f"  {uadx} quantize RUN --data DATA --out INT8")
    say(f"  {uadx} deploy INT8 --target openvino-cpu --out BUNDLE")
    say(f"  {uadx} predict BUNDLE IMAGES --category CATEGORY --out MAPS")
