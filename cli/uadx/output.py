"""What the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uad_plugins.errors import UadxError
from uad_plugins.progress import counting

__all__ = ["command", "counting", "emit_json", "note", "program", "result_folder", "say", "table"]


def program() -> str:
    """Return what to type to run this program: its path, quoted, where its name alone would not find it."""
    called, found = Path(sys.argv[0]), shutil.which("uadx")
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m uadx"
    known = called.stem == "uadx" and called.exists() and not (found and called.samefile(found))
    return shlex.quote(str(called)) if known else "uadx"


def command(*words: object) -> str:
    """Return what to type to run this program with these words; blanks in names of files are quoted."""
    return " ".join([program(), *(shlex.quote(str(word)) for word in words)])


def result_folder(out: Path | None) -> Path | None:
    """Make the folder that results are written to before anything is computed for it.

    Raises:
        UadxError: It cannot be made, or not be written to.
    """
    if out is None:
        return None
    folder = out.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UadxError(f"{folder}: no folder can be made: {error.strerror}", "name another one with --out") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UadxError(f"{folder}: cannot be written to", "name another folder with --out")
    return folder


def say(text: str) -> None:
    """Print a result line on stdout."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Print a remark on stderr."""
    sys.stderr.write(text + "\n")


def emit_json(content: Any) -> None:
    """Print one JSON document on stdout, in ASCII: whole whatever the terminal's encoding and the names of files."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


def emit_line(content: Any) -> None:
    """Print one JSON document as one line on stdout, at once."""
    sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is left-aligned, the others too where they are not numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(heading):
        numeric = index > 0 and all(
            row[index].replace("–", "0").rstrip("%").replace(".", "").strip().isdigit() for row in rows
        )
        grid.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell.replace("[", "\\[") for cell in row))
    console = Console(file=sys.stdout, highlight=False)
    if not sys.stdout.isatty():
        # A pipe has no width: a table must not be folded to 80 columns.
        console.width = 200
    console.print(grid)
