"""Reading a bundle: ``bundle.json`` and the files it names, checked before anything else looks at them.

The keys read here, of which the bundle may have more::

    "schema": "uadx.bundle/1"
    "seal": "..."                                               SHA-256 of bundle.json with 64 zeros in its place
    "onnx": "model.onnx"                                        a name that "files" has too
    "input": {"name": "input", "shape": [1, 3, 256, 256]}       float32, normalised
    "outputs": {"score": "score", "map": "map"}                 names in the ONNX file
    "preprocessing": {"mean": [r, g, b], "std": [r, g, b],      of pixels scaled to 0..1
                      "resize": "bilinear", "antialias": true, "color": "RGB"}
    "thresholds": {"pooled": {"value": 1.5},                    a number, or null where none was set
                   "categories": {"bolt": {"value": 1.25}}}
    "categories": ["bolt", "nut"]                               may be missing: then those with a threshold
    "files": {"model.onnx": {"sha256": "...", "bytes": 123}}    by path below the bundle, with "/"
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Mapping

from .files import RunnerError, sha256_of

MANIFEST = "bundle.json"
SCHEMA = "uadx.bundle/1"
UNSEALED = b"0" * 64


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what they were when it was written.

    Attributes:
        folder: Where it lies.
        onnx: The network.
        onnx_sha256: Hash of its file.
        input_name: Name of the network's input, float32 ``(1, 3, height, width)``, RGB, normalised.
        height: Of the input, in pixels.
        width: Of the input, in pixels.
        mean: Of each channel in RGB order, subtracted from pixels scaled to 0..1.
        std: Of each channel, divides after that.
        score_name: Output with one number, higher is more anomalous.
        map_name: Output whose last two dimensions are the anomaly map.
        pooled: Threshold for images whose category is not known; None where none was set.
        thresholds: Threshold of each category; the pooled one where it has none of its own.
    """

    folder: Path
    onnx: Path
    onnx_sha256: str
    input_name: str
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    score_name: str
    map_name: str
    pooled: float | None
    thresholds: dict[str, float | None]

    def threshold(self, category: str | None) -> float | None:
        """Return the threshold of a category, the pooled one for None; None where none was set.

        Raises:
            RunnerError: The bundle does not know the category.
        """
        if category is None:
            return self.pooled
        if category not in self.thresholds:
            known = ", ".join(sorted(self.thresholds)) or "none"
            raise RunnerError(f"category '{category}' is not in this bundle; it knows: {known}")
        return self.thresholds[category]


def read_bundle(folder: Path, verified: bool = False) -> Bundle:
    """Read and check a bundle.

    Args:
        folder: Where it lies.
        verified: The content of its files has been compared with the manifest already.

    Raises:
        RunnerError: It is no bundle or of another schema, the manifest or a file has changed or is missing, or the manifest
            asks for something that this runner does not do.
    """
    if folder.suffix == ".zip" and folder.is_file():
        raise RunnerError(f"{folder}: unpack the bundle first: python3 -m zipfile -e {folder.name} {folder.stem}")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise RunnerError(f"{folder}: not a bundle ({MANIFEST}: {error.strerror or error})") from None
    except ValueError as error:
        raise RunnerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise RunnerError(f"{path}: not the manifest of a bundle")
    if manifest["schema"] != SCHEMA:
        raise RunnerError(f"{path}: schema '{manifest['schema']}' is not known here; this runner reads '{SCHEMA}'")
    seal = str(manifest.get("seal"))
    if hashlib.sha256(raw.replace(seal.encode("utf-8"), UNSEALED, 1)).hexdigest() != seal:
        raise RunnerError(f"{path}: is not what was bundled: its content has changed; copy the bundle again")
    try:
        hashes = _checked(folder, manifest["files"], verified)
        return _parsed(folder, manifest, hashes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise RunnerError(f"{path}: damaged: {reason}") from None


def _checked(folder: Path, files: Mapping[str, Any], verified: bool) -> dict[str, str]:
    root = folder.resolve()
    hashes = {}
    for name, expected in files.items():
        path = folder / name
        climbs = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name
        if climbs or root not in path.resolve().parents:
            raise RunnerError(f"{folder}: '{name}' lies outside the bundle")
        if not path.is_file():
            raise RunnerError(f"{path}: is missing from the bundle")
        digest = str(expected["sha256"]).lower()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"the SHA-256 of '{name}' is none")
        if path.stat().st_size != int(expected["bytes"]) or not (verified or sha256_of(path) == digest):
            raise RunnerError(f"{path}: is not the file that was bundled: its content has changed; copy the bundle again")
        hashes[name] = digest
    return hashes


def _parsed(folder: Path, manifest: Mapping[str, Any], hashes: Mapping[str, str]) -> Bundle:
    preprocessing = manifest["preprocessing"]
    for key, value in (("resize", "bilinear"), ("antialias", True), ("color", "RGB")):
        if preprocessing[key] != value:
            raise ValueError(f"preprocessing '{key}' is {preprocessing[key]!r}; this runner knows {value!r} alone")
    batch, channels, height, width = (int(number) for number in manifest["input"]["shape"])
    if (batch, channels) != (1, 3) or min(height, width) < 1:
        raise ValueError(f"the input's shape is {manifest['input']['shape']}, not [1, 3, height, width]")
    mean, std = (_channels(preprocessing, key) for key in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError("'std' is not positive")
    onnx = manifest["onnx"]
    if onnx not in hashes:
        raise ValueError(f"'{onnx}' is not among its files")
    pooled = _threshold(manifest["thresholds"]["pooled"])
    own = {name: _threshold(entry) for name, entry in manifest["thresholds"]["categories"].items()}
    return Bundle(
        folder=folder,
        onnx=folder / onnx,
        onnx_sha256=hashes[onnx],
        input_name=str(manifest["input"]["name"]),
        height=height,
        width=width,
        mean=mean,
        std=std,
        score_name=str(manifest["outputs"]["score"]),
        map_name=str(manifest["outputs"]["map"]),
        pooled=pooled,
        thresholds={**dict.fromkeys(manifest.get("categories", ()), pooled), **own},
    )


def _channels(preprocessing: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in preprocessing[key])
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise ValueError(f"'{key}' is not three finite numbers")
    return values


def _threshold(entry: Mapping[str, Any]) -> float | None:
    value = entry["value"]
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"a threshold is {value}")
    return float(value)
