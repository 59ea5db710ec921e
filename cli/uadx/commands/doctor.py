"""``uadx doctor``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from uadx.output import emit_json, say, table


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Tell which engines and backends can be used on this machine, and what would make the others usable."""
    from uad_plugins.doctor import diagnose, machine

    facts, found = machine(), diagnose()
    if as_json:
        emit_json({"machine": facts, "components": [asdict(diagnosis) for diagnosis in found]})
        return
    for name, value in facts.items():
        say(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    table(["kind", "name", "usable", "detail"], [[d.kind, d.name, "yes" if d.usable else "no", d.detail] for d in found])
    # Below the table, whose cells are folded where the terminal is narrow: a command is there to be copied.
    helped: dict[str, list[str]] = {}
    for diagnosis in found:
        for command in filter(None, diagnosis.fix.split("; ")):
            helped.setdefault(command, []).append(diagnosis.name)
    for command, names in helped.items():
        say(f"{command}  # for {', '.join(dict.fromkeys(names))}")
