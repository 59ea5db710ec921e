"""An index file, CSV or JSON lines, with the columns path, category, split, label and optionally mask, defect."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from uad_plugins.data.samples import ANOMALOUS, NORMAL, SPLITS, Sample
from uad_plugins.errors import UadxError

SUMMARY = "a file index.csv or index.jsonl with columns path, category, split, label, optional mask"
NAMES = ("index.csv", "index.jsonl", "index.ndjson")
COLUMNS = ("path", "category", "split", "label", "mask", "defect")
REQUIRED = COLUMNS[:4]
LABELS = {
    **dict.fromkeys(("0", "normal", "good", "ok", "false"), NORMAL),
    **dict.fromkeys(("1", "anomalous", "anomaly", "abnormal", "bad", "ng", "defect", "defective", "true"), ANOMALOUS),
}
SPLIT_NAMES = {**{name: name for name in SPLITS}, "valid": "val", "validation": "val", "training": "train"}


def recognise(root: Path) -> float:
    """Return 1 for an index file itself, and for a folder that has one."""
    if root.is_file():
        return 1.0 if root.suffix.lower() in {".csv", ".jsonl", ".ndjson"} else 0.0
    return 1.0 if any((root / name).is_file() for name in NAMES) else 0.0


def scan(root: Path) -> Iterator[Sample]:
    """Yield the samples that the index names; relative paths start at the folder of the index file.

    A row that repeats another one is left out.

    Raises:
        UadxError: A column is missing, a row has a value that is not understood, or names the image of another row and says
            something else of it; the message names the line.
    """
    file = root if root.is_file() else next((root / name for name in NAMES if (root / name).is_file()), None)
    if file is None:
        raise UadxError(f"{root}: no index file", f"expected one of {', '.join(NAMES)}")
    folder = file.parent
    seen: dict[str, tuple[int, Sample]] = {}
    for line, row in rows_of(file):
        values = {key: "" if value is None else str(value).strip() for key, value in row.items()}
        for column in REQUIRED:
            if not values.get(column):
                foreign = [f"'{name}'" for name in values if name not in COLUMNS]
                hint = f"columns: {', '.join(COLUMNS)}{'; not understood: ' if foreign else ''}{', '.join(foreign)}"
                raise UadxError(f"{file}:{line}: no value for '{column}'", hint)
        label, split = LABELS.get(values["label"].lower()), SPLIT_NAMES.get(values["split"].lower())
        if label is None:
            raise UadxError(
                f"{file}:{line}: label '{values['label']}' is not understood", "use normal or anomalous (0 or 1)"
            )
        if split is None:
            raise UadxError(f"{file}:{line}: split '{values['split']}' is not understood", f"use one of {', '.join(SPLITS)}")
        mask = values.get("mask", "")
        sample = Sample(
            path=str(folder / values["path"]),
            category=values["category"],
            label=label,
            split=split,
            mask=str(folder / mask) if mask else "",
            defect=values.get("defect") or ("good" if label == NORMAL else "anomalous"),
        )
        first, known = seen.setdefault(os.path.normpath(sample.path), (line, sample))
        if first == line:
            yield sample
        elif replace(known, path=sample.path) != sample:
            raise UadxError(
                f"{file}:{line}: '{values['path']}' is in line {first} already, {_difference(known, sample)}",
                "name each image once: what is trained on must not be held out or tested on too",
            )


def _difference(one: Sample, other: Sample) -> str:
    """Say in words in what two rows of the same image differ."""
    names = ("split", "category", "label", "mask", "defect")
    name = next(name for name in names if getattr(one, name) != getattr(other, name))
    return f"in split '{one.split}'" if name == "split" else f"with another {name}"


def rows_of(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV or JSON lines file with the lines that they stand in; names of columns in lower case.

    Raises:
        UadxError: It is no such text; the message names the file.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            yield from _csv_rows(handle) if file.suffix.lower() == ".csv" else _json_rows(file, handle)
    except UnicodeDecodeError as error:
        raise UadxError(f"{file}: cannot be read: {error}", "save it as UTF-8 text") from error
    except csv.Error as error:
        raise UadxError(
            f"{file}: cannot be read: {error}", "save it as plain CSV, a quote that opens closed again"
        ) from error


def _csv_rows(handle: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    heading = next((line for line in handle if line.strip()), "")
    handle.seek(0)
    # Spreadsheets write semicolons where the comma is the decimal point.
    reader = csv.DictReader(handle, delimiter=max(",;\t", key=heading.count))
    # Blank lines above the heading are none.
    while reader.fieldnames is not None and not any(name.strip() for name in reader.fieldnames):
        reader.fieldnames = None
    for row in reader:
        yield reader.line_num, {str(key).strip().lower(): value for key, value in row.items() if key is not None}


def _json_rows(file: Path, handle: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(handle, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UadxError(f"{file}:{number}: not JSON: {error.msg}", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise UadxError(f"{file}:{number}: not a JSON object", 'for example {"path": "a.png", "category": "bolt", …}')
        yield number, {str(key).lower(): value for key, value in row.items()}
