"""``uadx predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uadx.output import counting, emit_json, note, say


def predict(
    run: Annotated[Path, typer.Argument(help="Trained run, or quantized model.", metavar="RUN")],
    paths: Annotated[list[str], typer.Argument(help="Image files, folders or globs.", metavar="PATH...")],
    category: Annotated[str | None, typer.Option("--category", help="The product shown, for its own threshold.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for heat maps and predictions.csv.", metavar="DIR")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images scored together.")] = 16,
    engine: Annotated[
        str | None, typer.Option("--engine", help="What executes the model; chosen by itself otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find anomalies in images: score, threshold, verdict and heat map for each.

    An image that cannot be read gets an error in its row, the others go on, and the exit status is 1.
    """
    from uad_plugins.artifacts import write_text
    from uad_plugins.detector import open_detector
    from uad_plugins.evaluation.predict import find_images
    from uad_plugins.evaluation.predict import predict as score
    from uad_plugins.evaluation.rows import to_csv

    files = find_images(paths)
    rows: list[dict[str, Any]] = []
    with open_detector(run, engine) as detector, counting("scoring images") as progress:
        for row in score(
            detector,
            files,
            category=category,
            out=out,
            batch_size=batch_size,
            progress=progress,
        ):
            rows.append(row)
            if not as_json:
                _show(row)
        if category is None and len(detector.categories) > 1:
            note("note: no --category given: judged by the threshold pooled over all of them")
    if out is not None:
        write_text(out / "predictions.csv", to_csv(rows))
        note(f"heat maps and predictions.csv: {out}")
    failed = sum(row["error"] is not None for row in rows)
    if as_json:
        emit_json({"predictions": rows, "errors": failed})
    if failed:
        note(f"{failed} of {len(rows)} images could not be read")
        raise typer.Exit(1)


def _show(row: dict[str, Any]) -> None:
    from uad_plugins.evaluation.rows import describe

    if row["error"] is not None:
        say(f"{'error':<9}  {'':>18}  {row['path']}: {row['error']}")
    else:
        say(f"{row['verdict']:<9}  {describe(row['score'], row['threshold']):>18}  {row['path']}")
