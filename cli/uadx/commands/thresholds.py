"""``uadx thresholds``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uadx.output import counting, emit_json, table


def thresholds(
    run: Annotated[Path, typer.Argument(help="Trained run.", metavar="RUN")],
    data: Annotated[str, typer.Argument(help="Images to set them from; not the test set you report on.", metavar="DATA")],
    method: Annotated[
        str, typer.Option("--method", help="normal-fpr (good images alone) or best-f1 (labelled).")
    ] = "normal-fpr",
    target_fpr: Annotated[float, typer.Option("--target-fpr", help="Share of good parts that may be rejected.")] = 0.01,
    layout: Annotated[str | None, typer.Option("--layout", help="Data layout; recognised by itself otherwise.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show them, store nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Set the decision thresholds of a run anew, from images of your own.

    All images of DATA are used, whatever split they are in; with normal-fpr those labelled normal.
    """
    from uad_plugins.artifacts import Run, write_json
    from uad_plugins.data.layouts import scan
    from uad_plugins.detector import open_detector
    from uad_plugins.evaluation.thresholds import thresholds_from_samples

    samples = scan(data, layout)
    with open_detector(run) as detector, counting("scoring images") as progress:
        result = thresholds_from_samples(
            detector,
            samples,
            range(len(samples)),
            method=method,
            target_fpr=target_fpr,
            kind=f"of {data}",
            progress=progress,
        )
    if not dry_run:
        write_json(Run.open(run).thresholds_file, result.as_dict())
    if as_json:
        emit_json(result.as_dict())
        return
    rows = [
        [n, f"{t.value:.4g}", t.how, str(t.normal), str(t.anomalous)]
        for n, t in [*result.categories.items(), ("pooled", result.pooled)]
    ]
    table(["category", "threshold", "how", "normal", "anomalous"], rows)
