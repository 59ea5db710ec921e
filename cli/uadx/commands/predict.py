"""``uadx predict``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer

from uad_plugins.errors import UsageError
from uadx.output import counting, emit_json, emit_line, note, result_folder, say


def predict(
    run: Annotated[Path, typer.Argument(help="Bundle, quantized model or trained run.", metavar="BUNDLE|RUN")],
    paths: Annotated[list[str] | None, typer.Argument(help="Image files, folders or globs.", metavar="PATH...")] = None,
    category: Annotated[str | None, typer.Option("--category", help="The product shown, for its own threshold.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for heat maps and predictions.csv.", metavar="DIR")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images scored together; with OpenVINO, decoded ahead.")
    ] = 16,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", help="What executes the model: openvino, onnxruntime, tensorrt, torch; chosen by itself otherwise."
        ),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(
            "--watch", help="Score images as they arrive in this folder, into --out/predictions.jsonl.", metavar="DIR"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document (with --watch: one JSON line an image).")
    ] = False,
) -> None:
    """Find anomalies in images: score, threshold, verdict and heat map for each.

    An image that cannot be read gets an error in its row, the others go on, and the exit status is 1. Heat maps
    of earlier calls are left out of folders and globs.
    """
    if watch is not None:
        _watch(run, paths, watch, out, category, batch_size, engine, as_json)
        return
    from uad_plugins.artifacts import write_text
    from uad_plugins.detector import open_detector
    from uad_plugins.evaluation.predict import PREDICTIONS, find_images
    from uad_plugins.evaluation.predict import predict as score
    from uad_plugins.evaluation.rows import to_csv

    if not paths:
        raise UsageError("no image to predict", "give files, folders or globs, or a folder to watch: --watch DIR")
    out = result_folder(out)
    found = {word: find_images([word]) for word in paths}
    files = list(dict.fromkeys(chain.from_iterable(found.values())))
    for word in (word for word, images in found.items() if files and not images):
        note(f"note: no image in {word}; heat maps of earlier calls are none")
    rows: list[dict[str, Any]] = []
    try:
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
    finally:
        # Interrupted, too: the heat maps that are there have their rows.
        if out is not None and rows:
            write_text(out / PREDICTIONS, to_csv(rows))
            note(f"heat maps and {PREDICTIONS}: {out}")
    failed = sum(row["error"] is not None for row in rows)
    if as_json:
        emit_json({"predictions": rows, "errors": failed})
    if failed:
        note(f"{failed} of {len(rows)} images have an error in their row")
        raise typer.Exit(1)


def _watch(
    run: Path,
    paths: list[str] | None,
    folder: Path,
    out: Path | None,
    category: str | None,
    batch_size: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Score images as they arrive, until SIGTERM or Ctrl-C; either may come while the detector is being opened."""
    if paths:
        raise UsageError("--watch takes the place of PATH", "give one of them")
    if out is None:
        raise UsageError("no folder to write the results to", "add --out DIR")
    with _stopping() as stop:
        from uad_plugins.detector import open_detector
        from uad_plugins.evaluation.watch import Watch

        with open_detector(run, engine) as detector:
            watch = Watch(folder.expanduser(), out.expanduser(), category, stop, batch_size=batch_size, tell=note)
            note(f"watching {folder}; results: {out / 'predictions.jsonl'}")
            count = 0
            for row in watch.run(detector):
                count += 1
                if as_json:
                    emit_line(row)
                else:
                    _show(row)
                    sys.stdout.flush()
    note(f"stopped after {count} images")


@contextmanager
def _stopping() -> Iterator[Event]:
    """Yield an event that SIGTERM and Ctrl-C set; a second one ends the program at once."""
    stop = Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(row: dict[str, Any]) -> None:
    from uad_plugins.evaluation.rows import describe

    if row["error"] is not None:
        say(f"{'error':<9}  {'':>18}  {row['path']}: {row['error']}")
    else:
        say(f"{row['verdict']:<9}  {describe(row['score'], row['threshold']):>18}  {row['path']}")
