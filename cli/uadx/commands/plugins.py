"""``uadx plugins``."""

from __future__ import annotations

from typing import Annotated

import typer

from uadx.output import emit_json, table

app = typer.Typer(
    help="What is installed to extend uadx.",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """What is installed to extend uadx."""


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List every model, layout, quantizer, target, runtime and command, and the plugins that failed to load."""
    from uad_plugins.registry import registry

    found = registry()
    entries = [
        {
            "kind": entry.kind,
            "name": entry.name,
            "distribution": entry.distribution,
            "version": entry.version,
            "status": "ok",
            "summary": entry.item.summary,
        }
        for entry in sorted(found.entries.values(), key=lambda entry: (entry.kind, entry.name))
    ]
    entries += [
        {
            "kind": "plugin",
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "status": "broken",
            "summary": plugin.reason,
        }
        for plugin in found.broken
    ]
    if as_json:
        emit_json({"plugins": entries})
        return
    heading = ["kind", "name", "distribution", "version", "status", "summary"]
    table(heading, [[entry[key] for key in heading] for entry in entries])
