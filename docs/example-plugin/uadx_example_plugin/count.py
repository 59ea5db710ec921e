"""``uadx count``."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def count(
    data: Annotated[str, typer.Argument(help="Folder of images, or index file.", metavar="DATA")],
    layout: Annotated[str | None, typer.Option("--layout", help="Data layout; recognised by itself otherwise.")] = None,
) -> None:
    """Count the images of each category."""
    from uad_plugins.data.layouts import scan

    for category, number in sorted(Counter(sample.category for sample in scan(data, layout)).items()):
        typer.echo(f"{category}\t{number}")
