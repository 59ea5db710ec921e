"""``uadx evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uad_plugins.errors import UsageError, missing_extra
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
    """Measure a bundle, a quantized model or a run on a labelled test set, category by category.

    Categories that it was not trained on are left out, unless --category names them or there are no others.
    """
    from uad_plugins.data.layouts import scan, usual_layout
    from uad_plugins.data.unseen import trained_on
    from uad_plugins.detector import open_detector

    if all_maps and out is None:
        raise UsageError("--all-maps has no folder to write to", "add --out DIR")
    try:
        from uad_plugins.evaluation.evaluate import evaluate as measure
        from uad_plugins.evaluation.record import keep, origin_of
        from uad_plugins.evaluation.report import HEADINGS, figure, write_report
    except ModuleNotFoundError as error:
        raise missing_extra("evaluating", "train", error) from error
    origin = origin_of(run.expanduser())
    samples = scan(data, layout or usual_layout(data, origin), category)
    out = result_folder(out)
    with open_detector(run, engine) as detector, counting("scoring images") as progress:
        tested = [name for name in samples.categories if len(samples.where(split="test", category=name))]
        left_out = [name for name in tested if name not in detector.categories]
        if left_out and category is None and len(left_out) < len(tested):
            note(f"note: not trained on, and left out: {', '.join(left_out)}; --category NAME measures one all the same")
            samples = samples.only([name for name in samples.categories if name not in left_out])
        else:
            for name in left_out:
                which = "a threshold of its own" if name in detector.thresholds.categories else "the pooled threshold"
                note(f"warning: '{name}' was not trained on; it is judged by {which}")
            left_out = []
        result = measure(detector, samples, out=out, all_maps=all_maps, left_out=left_out, progress=progress)
    report = result.report
    learnt = trained_on(samples, origin)
    if learnt:
        note(f"warning: {learnt} of these test images were trained on: the figures say nothing of new ones")
    missing = sorted(set(detector.categories) - set(report["categories"]))
    if missing and category is None:
        note(f"warning: no test image of {', '.join(missing)}: not measured, and not in the mean")
    if set(report["categories"]) == set(detector.categories) and not report["unreadable"] and not learnt:
        keep(run.expanduser(), data, report)
    if out is not None:
        facts = {"model": str(run), "data": data, **({"left out": ", ".join(left_out)} if left_out else {})}
        write_report(result, out / "report.html", title="Evaluation", facts=facts)
    for path, reason in report["unreadable"].items():
        note(f"warning: {path}: {reason}")
    for path, reason in result.without_picture.items():
        note(f"warning: {path}: its heat map cannot be written: {reason}")
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
    if report["unreadable"] or result.without_picture:
        raise typer.Exit(1)
