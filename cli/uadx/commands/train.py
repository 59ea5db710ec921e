"""``uadx train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uad_plugins.config import find_config, from_assignments, from_environment, merge, put, read_yaml, resolve
from uad_plugins.errors import UsageError, missing_extra
from uadx.output import command, counting, emit_json, note, say


def train(
    data: Annotated[str, typer.Argument(help="Folder of images, or index file.", metavar="DATA")],
    assignments: Annotated[
        list[str] | None, typer.Argument(help="More KEY=VALUE settings.", metavar="[KEY=VALUE]...")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Method: see 'uadx plugins list'; or anomalib:CLASS.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write the run to.", metavar="RUN")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file, or the name of a recipe that ships, such as stfpm_short.", metavar="FILE"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set one key.", metavar="KEY=VALUE")] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="timm backbone.")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Backbone weights: hub, bundled, or a file or folder.")
    ] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Input side in pixels.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images in a training batch.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="Data layout; recognised by itself otherwise.")] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", help="Train on this category alone (repeatable).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of split, order and initial weights.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train one model on all categories of a data set, from images of good parts only.

    Settings are merged in this order, the last wins: defaults, the method's recipe, --config FILE, environment variables
    UADX_TRAIN__SECTION__KEY, flags.
    """
    if out is None:
        raise UsageError("no folder to write the run to", "add --out RUN")
    flags: dict[str, Any] = from_assignments([*(set_ or []), *(assignments or [])])
    for path, value in (
        (("model", "name"), model),
        (("model", "backbone"), backbone),
        (("model", "weights"), weights),
        (("data", "image_size"), image_size),
        (("data", "train_batch_size"), batch_size),
        (("data", "layout"), layout),
        (("data", "categories"), category or None),
        (("data", "skip_bad"), skip_bad or None),
        (("trainer", "max_epochs"), epochs),
        (("seed",), seed),
    ):
        if value is not None:
            put(flags, path, value)
    config = find_config(config) if config else None
    file = read_yaml(config) if config else {}
    given = merge(merge(file, from_environment()), flags)
    resolved = resolve(file=config, flags=flags)
    meant = (file.get("model") or {}).get("name", resolved.model.name)
    if meant != resolved.model.name:
        note(f"note: {config} is made for {meant}; its settings are used for {resolved.model.name}")
    try:
        from uad_plugins.training.train import train as run_training
    except ModuleNotFoundError as error:
        raise missing_extra("training", "train", error) from error
    with counting("verifying images") as progress:
        metrics = run_training(
            resolved, data, out, given=given, resume=resume, overwrite=overwrite, verifying=progress, tell=note
        )
    if metrics is None:
        return
    if as_json:
        emit_json({"run": str(out), **metrics})
        return
    loss = metrics["best_val_loss"]
    shown = f", held-out loss {loss:.4g}" if loss is not None else ""
    say(f"{out}: best epoch {metrics['best_epoch']} of {metrics['epochs']}{shown}, {metrics['seconds']:.0f} s")
    note(f"next: {command('evaluate', out, data)}")
