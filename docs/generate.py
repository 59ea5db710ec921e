"""Writes ``docs/commands.md`` from the program itself. ``--check`` only compares."""

import os
import sys
from pathlib import Path

# Help is wrapped to the terminal; the page must not depend on it.
os.environ["COLUMNS"], os.environ["NO_COLOR"], os.environ["UADX_LOAD_PLUGINS"] = "100", "1", ""
os.environ["TERMINAL_WIDTH"] = "100"

import typer.main  # noqa: E402
from uadx.app import app  # noqa: E402

PAGE = Path(__file__).parent / "commands.md"
HEADING = "# Commands\n\nGenerated from the program: `python docs/generate.py`.\n"


def sections(command, path):
    """Yield the help of a command and of all below it."""
    context = command.make_context(path, [], resilient_parsing=True)
    context.info_name = path
    text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    yield f"## {path}\n\n```text\n{text}\n```\n"
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from sections(below, f"{path} {name}")


def page():
    """Return the page."""
    return "\n".join([HEADING, *sections(typer.main.get_command(app), "uadx")])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else "docs/commands.md is not what the program says: make docs")
    PAGE.write_text(page())
