"""What is on record of a model: its origin, and its latest evaluation.

The evaluation is kept in the folder of a run or quantized model so that a bundle made of it can say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from uad_plugins.artifacts import MANIFEST as RUN_MANIFEST
from uad_plugins.artifacts import Run, read_json, write_json
from uad_plugins.deployment.bundle import is_bundle, read_manifest
from uad_plugins.errors import UadxError
from uad_plugins.quantized import MANIFEST as QUANTIZED_MANIFEST
from uad_plugins.quantized import Quantized, open_trained

NAME = "evaluation.json"
FIGURES = ("categories", "mean", "pooled")


def keep(folder: Path, data: str, report: Mapping[str, Any]) -> None:
    """Note what was measured; nothing is done for a bundle, which is sealed, and for a folder that cannot be written to.

    Args:
        folder: Run, quantized model or bundle.
        data: What it was measured on.
        report: What ``evaluate`` found.
    """
    model = _model(folder)
    if model is not None:
        with suppress(OSError):
            write_json(folder / NAME, {"model": model, "data": data, **{name: report[name] for name in FIGURES}})


def kept(folder: Path) -> dict[str, Any]:
    """Return ``data`` and the figures of the latest evaluation; empty where there is none, or it was of another model."""
    with suppress(UadxError):
        content = read_json(folder / NAME)
        if isinstance(content, dict) and content.pop("model", None) == _model(folder):
            return content
    return {}


def origin_of(folder: Path) -> dict[str, Any]:
    """Return what the training of a run, quantized model or bundle began with, as ``Run.source`` gives it.

    A bundle says little of it, and other folders, or damaged ones, nothing.
    """
    with suppress(UadxError):
        if not is_bundle(folder):
            return open_trained(folder).source()
        manifest = read_manifest(folder)
        return {**manifest.source, "products": manifest.categories}
    return {}


def _model(folder: Path) -> Any:
    """Return what tells the folder's model from any other; None: it is neither a run nor a quantized model."""
    if (folder / RUN_MANIFEST).is_file():
        return Run(folder).manifest().checkpoint_sha256
    if (folder / QUANTIZED_MANIFEST).is_file():
        return {name: facts["sha256"] for name, facts in Quantized(folder).manifest().files.items()}
    return None
