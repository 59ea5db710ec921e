"""Writes ``commands.md`` and ``configuration.md`` from the program itself. ``--check`` only compares."""

import json
import os
import sys
from pathlib import Path

# Help is wrapped to the terminal; the page must not depend on it.
os.environ["COLUMNS"], os.environ["NO_COLOR"], os.environ["UADX_LOAD_PLUGINS"] = "100", "1", ""
os.environ["TERMINAL_WIDTH"] = "100"

import typer.main  # noqa: E402
from uadx.app import app  # noqa: E402

from uad_plugins.config import TrainConfig  # noqa: E402
from uad_plugins.registry import registry  # noqa: E402

FOLDER = Path(__file__).parent

COMMANDS = "# Commands\n\nGenerated from the program: `python docs/generate.py`.\n"

CONFIGURATION = """# Configuration

Generated from the program: `python docs/generate.py`. What is set where, and what wins: [training](training.md). A method's
recipe, or that of `--config`, has other values than the defaults given here.

    uadx train DATA --out RUN --set data.train_batch_size=16 optimizer.lr=0.1     # or in a file, for --config
    uadx quantize RUN --data DATA --out INT8 --set ranges=quantile                # options of a backend have no section
"""


def sections(command, path, parent=None):
    """Yield the help of a command and of all below it, as the program prints it."""
    context = command.make_context(path.rpartition(" ")[2], [], parent, resilient_parsing=True)
    text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    yield f"## {path}\n\n```text\n{text}\n```\n"
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from sections(below, f"{path} {name}", context)


def values(schema):
    """Say in a few words which values a JSON schema takes."""
    if "anyOf" in schema:
        return ", or ".join(values(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "pattern" in schema:
        return ", ".join(f"`{each}`" for each in schema["pattern"].strip("^($)").split("|"))
    kind = schema.get("type", "any")
    if kind == "array":
        inner = schema.get("prefixItems") or [schema["items"]]
        return f"list of {values(inner[0])}" if len(inner) == 1 else f"[{', '.join(values(each) for each in inner)}]"
    name = {"string": "text", "integer": "whole number", "boolean": "`true`, `false`", "object": "keys", "null": "`null`"}
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[key]:.10g}" for key, word in words.items() if key in schema]
    return " ".join([name.get(kind, kind), *limits])


def table(schema, prefix=""):
    """Return the keys of a pydantic model as a table."""
    return "\n".join(["| key | values | default | what |", "| --- | --- | --- | --- |", *rows(schema, prefix)]) + "\n"


def rows(schema, prefix):
    """Yield a row for each key of a pydantic model, and of the models in it; the sections of a training have tables."""
    defaults = schema().model_dump(mode="json")
    for name, facts in schema.model_json_schema()["properties"].items():
        below = schema.model_fields[name].annotation
        if hasattr(below, "model_fields"):
            yield from rows(below, f"{prefix}{name}.") if schema is not TrainConfig else ()
            continue
        default = json.dumps(defaults[name], ensure_ascii=False)
        cells = [f"`{prefix}{name}`", values(facts), f"`{default}`", facts.get("description", "")]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def configuration():
    """Yield the configuration of a training by section, then the options of methods, quantizers and targets."""
    yield CONFIGURATION
    yield f"## Training\n\n{table(TrainConfig)}"
    for name, field in TrainConfig.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            about = field.annotation.__doc__.strip().replace("``", "`")
            yield f"## {name}\n\n{about}\n\n{table(field.annotation, f'{name}.')}"
    titles = {"model": ("method", "model.options."), "quantizer": ("backend", ""), "target": ("target", "")}
    for kind, (title, prefix) in titles.items():
        for plugin in sorted(registry().items(kind), key=lambda item: item.name):
            if plugin.options.model_fields:
                yield f"## Options of the {title} {plugin.name}\n\n{table(plugin.options, prefix)}"


PAGES = {
    "commands.md": lambda: "\n".join([COMMANDS, *sections(typer.main.get_command(app), "uadx")]),
    "configuration.md": lambda: "\n".join(configuration()),
}


if __name__ == "__main__":
    for name, page in PAGES.items():
        if "--check" not in sys.argv:
            (FOLDER / name).write_text(page())
        elif not (FOLDER / name).is_file() or (FOLDER / name).read_text() != page():
            sys.exit(f"docs/{name} is not what the program says: make docs")
