"""``uadx evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uad_plugins.errors import missing_extra
from uadx.output import counting, emit_json, note, result_folder, table


def evaluate(
    run: Annotated[Path, typer.Argument(help="Bundle, quantized model or trained run.", metavar="BUNDLE|RUN")],
    data: Annotated[str, typer.Argument(help="Folder of images, or index file; its test split is used.", metavar="DATA")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for report.html, report.json, scores.csv and heat maps.", metavar="DIR"),
    ] = None,
    all_maps: Annotated[bool, typer.Option("--all-maps", help="Write the heat map of every test image.")] = False,
    layout: Annotated[str | None, typer.Option("--layout", help="Data layout; as in training, or recognised.")] = None,
    category: Annotated[list[str] | None, typer.Option("--category", help="This category alone (repeatable).")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="What executes the model; chosen by itself otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure a bundle, a quantized model or a run on a labelled test set, category by category."""
    from uad_plugins.data.layouts import scan, usual_layout
    from uad_plugins.detector import open_detector

    try:
        from uad_plugins.evaluation.evaluate import evaluate as measure
        from uad_plugins.evaluation.record import keep, origin_of
        from uad_plugins.evaluation.report import HEADINGS, figure, write_report
    except ModuleNotFoundError as error:
        raise missing_extra("evaluating", "train", error) from error
    samples = scan(data, layout or usual_layout(data, origin_of(run.expanduser())), category)
    out = result_folder(out)
    with open_detector(run, engine) as detector, counting("scoring images") as progress:
        foreign = [name for name in samples.categories if name not in detector.categories]
        if foreign and category is None and len(foreign) < len(samples.categories):
            note(f"note: not trained on, and left out: {', '.join(foreign)}; --category NAME measures one all the same")
            samples = samples.only([name for name in samples.categories if name not in foreign])
        else:
            for name in foreign:
                note(f"warning: '{name}' was not trained on; it is judged by the pooled threshold")
        result = measure(detector, samples, out=out, all_maps=all_maps, progress=progress)
        missing = sorted(set(detector.categories) - set(result.report["categories"]))
    report = result.report
    if missing and category is None:
        note(f"warning: no test image of {', '.join(missing)}: not measured, and not in the mean")
    if not missing:
        keep(run.expanduser(), data, report)
    if out is not None:
        write_report(result, out / "report.html", title="Evaluation", facts={"model": str(run), "data": data})
    for path, reason in report["unreadable"].items():
        note(f"warning: {path}: {reason}")
    if as_json:
        emit_json(report)
    else:
        rows = [
            [
                name,
                *(figure(values.get(metric)) for metric in HEADINGS),
                f"{values['normal']}",
                f"{values['anomalous']}",
            ]
            for name, values in report["categories"].items()
        ]
        rows.append(["mean", *(figure(report["mean"][metric]) for metric in HEADINGS), "", ""])
        pooled = report["pooled"]
        rows.append(["pooled", *(figure(pooled[m]) for m in HEADINGS), str(pooled["normal"]), str(pooled["anomalous"])])
        table(["category", *HEADINGS.values(), "good", "defective"], rows)
    if out is not None:
        note(f"report: {out / 'report.html'}")
    if report["unreadable"]:
        raise typer.Exit(1)
