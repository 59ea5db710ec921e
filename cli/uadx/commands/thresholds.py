"""``uadx thresholds``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uadx.output import counting, emit_json, note, table


def thresholds(
    run: Annotated[Path, typer.Argument(help="Trained run, or quantized model.", metavar="RUN")],
    data: Annotated[str, typer.Argument(help="Images to set them from; not the test set you report on.", metavar="DATA")],
    method: Annotated[
        str, typer.Option("--method", help="normal-fpr (good images alone) or best-f1 (labelled).")
    ] = "normal-fpr",
    target_fpr: Annotated[
        float | None, typer.Option("--target-fpr", help="Share of good parts that may be rejected; 0.01 unless given.")
    ] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="Data layout; as in training, or recognised.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show them, store nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Set the decision thresholds of a run or a quantized model anew.

    From images that the run has not been trained on: all others of DATA, with normal-fpr those labelled normal. If DATA is
    what the run was trained on, or a copy of it, from the images held out from training alone. Products that DATA lacks keep
    their thresholds; then the pooled one is kept too.
    """
    from uad_plugins.artifacts import write_json
    from uad_plugins.config import ratio_scale
    from uad_plugins.data.unseen import unseen
    from uad_plugins.detector import Prediction, open_detector
    from uad_plugins.errors import UsageError
    from uad_plugins.evaluation.thresholds import BEST_F1, check_request, thresholds_from_samples
    from uad_plugins.quantized import open_trained

    check_request(method, target_fpr)
    if method == BEST_F1 and target_fpr is not None:
        raise UsageError(f"--target-fpr is of normal-fpr, and {BEST_F1} aims at no rate", "leave one of them out")
    station = open_trained(run)
    samples, indices, held_out = unseen(data, layout, station.source())
    kind = "held out from training" if held_out else f"of {data}"
    if held_out:
        note("note: the run was trained on this data; the images held out from training are used")
    elif len(indices) < len(samples):
        note(f"note: the run was trained on or is tested with {len(samples) - len(indices)} of these images: left out")
    unreadable: list[Prediction] = []
    with open_detector(run) as detector, counting("scoring images") as progress:
        names = [samples.categories[number] for number in samples.category_index[indices]]
        foreign = sorted(set(names).difference(detector.categories))
        if 0 < len(foreign) < len(set(names)):
            note(f"note: not trained on, and left out: {', '.join(foreign)}")
            indices = indices[[name not in foreign for name in names]]
        result = thresholds_from_samples(
            detector,
            samples,
            indices,
            method=method,
            target_fpr=0.01 if target_fpr is None else target_fpr,
            kind=kind,
            ratio_scale=ratio_scale(station.manifest().model),
            progress=progress,
            unreadable=unreadable.append,
        )
        result, kept = result.over(detector.thresholds, detector.categories)
    for prediction in unreadable:
        note(f"warning: {prediction.path}: {prediction.failure}")
    if kept:
        note(f"note: not measured, and kept as they were: {', '.join(kept)}")
    if not dry_run:
        write_json(station.thresholds_file, result.as_dict())
    if as_json:
        emit_json(result.as_dict())
    else:
        rows = [
            [n, f"{t.value:.4g}", t.how, str(t.normal), str(t.anomalous)]
            for n, t in [*result.categories.items(), ("pooled", result.pooled)]
        ]
        table(["category", "threshold", "how", "normal", "anomalous"], rows)
    if unreadable:
        raise typer.Exit(1)
