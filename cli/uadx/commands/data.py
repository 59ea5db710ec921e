"""``uadx data``: check a data set, make a synthetic one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uadx.output import counting, emit_json, note, say, table

app = typer.Typer(
    help="Check a data set, or make a synthetic one.",
    no_args_is_help=True,
)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="Folder of images, or index file.", metavar="DATA")],
    layout: Annotated[str | None, typer.Option("--layout", help="Data layout; recognised by itself otherwise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Decode every image and mask and report what is there and what is wrong.

    The exit status is 1 when something would break training.
    """
    from uad_plugins.data.check import check_data
    from uad_plugins.data.layouts import layout_of, left_out, scan

    samples = scan(data, layout)
    with counting("checking images") as progress:
        report = check_data(
            samples,
            progress,
            left_out=left_out(data, samples, layout),
            exhaustive=layout_of(data, layout).exhaustive,
        )
    if as_json:
        emit_json(report.as_dict())
    else:
        rows = [
            [
                name,
                str(found.train),
                str(found.val),
                str(found.test_normal),
                str(found.test_anomalous),
                str(found.masks),
                _some(found.sizes),
                _some(found.formats),
            ]
            for name, found in report.categories.items()
        ]
        table(["category", "train", "val", "test good", "test defective", "masks", "sizes", "formats"], rows)
        for problem in report.problems:
            say(f"{problem.severity}: {problem.path + ': ' if problem.path else ''}{problem.message}")
        if not report.problems:
            say("no problem found")
    if not report.trainable:
        unreadable = any((problem.severity, problem.kind) == ("error", "unreadable") for problem in report.problems)
        ways = ", or leave unreadable files out with 'uadx train --skip-bad'" if unreadable else ""
        note(f"training would fail: repair the errors above{ways}")
        raise typer.Exit(1)


def _some(counts: dict[str, int]) -> str:
    """Write the most frequent keys of a count, and how many others there are."""
    ranked = sorted(counts, key=lambda key: -counts[key])
    more = f" +{len(ranked) - 2} more" if len(ranked) > 2 else ""
    return ", ".join(ranked[:2]) + more


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make.", metavar="OUT")],
    size: Annotated[int, typer.Option("--size", min=32, max=8192, help="Side of an image in pixels.")] = 256,
    train: Annotated[int, typer.Option("--train", min=2, help="Training images of each product.")] = 60,
    test: Annotated[
        int, typer.Option("--test", min=0, help="Good test images of each product; as many defective ones.")
    ] = 24,
    product: Annotated[list[str] | None, typer.Option("--product", help="This product alone (repeatable).")] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed makes the same images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the synthetic products, with defects and masks, in MVTec AD layout."""
    from uad_plugins.data.layouts import scan
    from uad_plugins.data.products.synthesis import synthesize

    out = out.expanduser()
    with counting("drawing images") as progress:
        synthesize(out, products=product, side=size, train=train, test=test, seed=seed, progress=progress)
    if as_json:
        emit_json({"out": str(out), "categories": scan(out).categories, "train": train, "test": test, "size": size})
        return
    say(str(out))
