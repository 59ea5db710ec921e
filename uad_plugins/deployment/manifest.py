"""What ``bundle.json`` says: a schema with a version, documented in ``docs/bundle.schema.json``. No torch in here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from uad_plugins.artifacts import versions
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.thresholds import SCHEMA as THRESHOLDS_SCHEMA
from uad_plugins.evaluation.thresholds import Threshold, Thresholds

MANIFEST = "bundle.json"
FAMILY, VERSION = "uadx.bundle", 1
SCHEMA = f"{FAMILY}/{VERSION}"

ENDINGS = frozenset({".onnx", ".xml", ".bin", ".json", ".pbtxt", ".md", ".jpg", ".png", ".py", ".txt"})
"""Endings of the files that a bundle may hold. None of them is a pickle, and nothing in a bundle is ever unpickled."""

UNSEALED = "0" * 64


class Part(BaseModel):
    """Base of all parts: keys that this version does not know are left aside, so that later ones can add some."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), frozen=True)


class BundleFile(Part):
    """One file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of its content, hexadecimal.")
    bytes: int = Field(ge=0, description="Its size.")


class InputSpec(Part):
    """The input of the model file."""

    name: str
    shape: tuple[int, int, int, int] = Field(description="One image: [1, height, width, 3] or [1, 3, height, width].")
    dtype: Literal["uint8", "float32"]
    layout: Literal["NHWC", "NCHW"]


class OutputNames(Part):
    """The outputs of the model file."""

    score: str = Field(description="Shape [1]: higher is more anomalous, not bounded above.")
    map: str = Field(description="Shape [1, height, width]: anomaly of each pixel of the input.")


class PreprocessingSpec(Part):
    """How an image becomes the input."""

    color: Literal["RGB"] = Field("RGB", description="Order of the channels.")
    resize: Literal["bilinear"] = Field("bilinear", description="To the input's height and width; the aspect is not kept.")
    antialias: Literal[True] = Field(True, description="Scaling down averages over all source pixels (as Pillow does).")
    mean: tuple[float, float, float] = Field(description="Of the channels of pixels in 0..1, subtracted.")
    std: tuple[float, float, float] = Field(description="Of the same, divides after that.")
    normalised_by: Literal["graph", "caller"] = Field(description="Who does that: the model file or its user.")


class ThresholdValue(Part):
    """One decision threshold."""

    value: float | None = Field(description="Scores above it are anomalous; null where none was set.")
    how: str = Field(description="quantile, lognormal, normal, largest or f1; see docs/training.md.")
    normal: int = Field(ge=0, description="Normal images it was set from.")
    anomalous: int = Field(0, ge=0, description="Anomalous images it was set from.")


class ThresholdSet(Part):
    """The decision thresholds."""

    pooled: ThresholdValue = Field(description="For images whose category is not known.")
    categories: dict[str, ThresholdValue]
    method: str = Field(description="normal-fpr or best-f1.")
    target_fpr: float | None = Field(description="Share of good parts that may be rejected.")
    source: str = Field(description="Which images they were set from, in words.")

    @classmethod
    def of(cls, thresholds: Thresholds) -> ThresholdSet:
        """Turn thresholds into what JSON can hold: a threshold that was never set is null."""

        def value(threshold: Threshold) -> ThresholdValue:
            finite = threshold.value if math.isfinite(threshold.value) else None
            return ThresholdValue(value=finite, how=threshold.how, normal=threshold.normal, anomalous=threshold.anomalous)

        return cls(
            pooled=value(thresholds.pooled),
            categories={name: value(item) for name, item in thresholds.categories.items()},
            method=thresholds.method,
            target_fpr=thresholds.target_fpr,
            source=thresholds.source,
        )

    def thresholds(self) -> Thresholds:
        """Return them as the detectors take them: nothing is above a threshold that was never set."""
        content = self.model_dump()
        for entry in (content["pooled"], *content["categories"].values()):
            entry["value"] = math.inf if entry["value"] is None else entry["value"]
        return Thresholds.from_dict({"schema": THRESHOLDS_SCHEMA, **content})


class BundleManifest(Part):
    """What ``bundle.json`` says of a bundle."""

    schema_: Literal["uadx.bundle/1"] = Field("uadx.bundle/1", alias="schema")
    seal: str = Field(
        UNSEALED, pattern="^[0-9a-f]{64}$", description="SHA-256 of bundle.json with this value replaced by 64 zeros."
    )
    target: str = Field(description="What it was packaged for.")
    model: str = Field(description="Method.")
    categories: list[str] = Field(min_length=1, description="Products the model was trained on.")
    precision: Literal["fp32", "fp16", "int8"]
    profile: Literal["float", "openvino", "tensorrt"] = Field("float", description="Rules that the quantized graph follows.")
    onnx: str | None = Field(None, description="The model as ONNX: a name in 'files'.")
    openvino: str | None = Field(None, description="The model as OpenVINO IR (.xml; the .bin lies beside it).")
    input: InputSpec
    outputs: OutputNames
    preprocessing: PreprocessingSpec
    score: dict[str, Any] = Field(description="What score and map are: their range, and how they are normalised.")
    thresholds: ThresholdSet
    calibration: dict[str, Any] = Field(default_factory=dict, description="What INT8 was calibrated on; empty for floats.")
    metrics: dict[str, Any] = Field(default_factory=dict, description="What was measured before it was packaged.")
    weights: dict[str, Any] = Field(default_factory=dict, description="Of the backbone: origin and licence.")
    source: dict[str, Any] = Field(default_factory=dict, description="The run or quantized model it was made from.")
    checks: dict[str, list[str]] = Field(default_factory=dict, description="What the target's rules found, by rule.")
    details: dict[str, Any] = Field(default_factory=dict, description="What else the target has to say.")
    versions: dict[str, str] = Field(default_factory=versions, description="Of the software that made it.")
    files: dict[str, BundleFile] = Field(description="Every other file, by its path below the bundle, with '/'.")

    @field_validator("files")
    @classmethod
    def _names_are_plain(cls, files: dict[str, BundleFile]) -> dict[str, BundleFile]:
        for name in files:
            wrong = complaint(name)
            if wrong:
                raise ValueError(f"file '{name}' {wrong}")
        return files

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` of the input in pixels."""
        shape = self.input.shape
        return (shape[1], shape[2]) if self.input.layout == "NHWC" else (shape[2], shape[3])

    def text(self) -> str:
        """Return the sealed text of ``bundle.json``."""
        content = {**self.model_dump(by_alias=True), "seal": UNSEALED}
        blank = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # Bytes of names that are not UTF-8 become the escapes that JSON has for them.
        sealed = blank.encode("utf-8", "backslashreplace")
        return sealed.replace(UNSEALED.encode(), hashlib.sha256(sealed).hexdigest().encode(), 1).decode()


def outside(name: str) -> str:
    """Say so if a name leads out of a bundle; empty for one that does not."""
    path = PurePosixPath(name)
    climbs = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name or not path.parts
    return "lies outside the bundle" if climbs else ""


def complaint(name: str) -> str:
    """Say what is wrong with the name of a file in a bundle; empty for a good one."""
    path = PurePosixPath(name)
    if outside(name):
        return outside(name)
    if path.as_posix() != name or name == MANIFEST:
        return "is not a plain name"
    if path.suffix.lower() not in ENDINGS:
        return "is of a kind that a bundle does not hold"
    return ""


def parse(raw: bytes, where: str) -> BundleManifest:
    """Read the text of ``bundle.json``.

    Args:
        raw: Its bytes.
        where: The bundle, for messages.

    Raises:
        UadxError: It is no manifest, of another version of the schema, changed, or names files that it must not.
    """
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UadxError(f"{where}: {MANIFEST} is damaged: {error}", "copy the bundle again") from None
    schema = content.get("schema") if isinstance(content, Mapping) else None
    if schema != SCHEMA:
        family, _, version = str(schema).partition("/")
        if family == FAMILY and version.isdecimal() and int(version) > VERSION:
            raise UadxError(f"{where}: a bundle of the newer schema {schema}; this version reads {SCHEMA}", "update uadx")
        raise UadxError(f"{where}: {MANIFEST} is not the manifest of a bundle (schema: {schema})", "deploy it again")
    seal = str(content.get("seal"))
    if hashlib.sha256(raw.replace(seal.encode(), UNSEALED.encode(), 1)).hexdigest() != seal:
        raise UadxError(f"{where}: {MANIFEST} is not what was written: its content has changed", "copy the bundle again")
    try:
        manifest = BundleManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UadxError(f"{where}: {MANIFEST} is damaged: {place}: {first['msg']}", "deploy it again") from None
    for name in (manifest.onnx, manifest.openvino):
        if name is not None and name not in manifest.files:
            raise UadxError(f"{where}: {MANIFEST} is damaged: '{name}' is not among its files", "deploy it again")
    return manifest


def json_schema() -> str:
    """Return the JSON schema of ``bundle.json`` as text."""
    schema = BundleManifest.model_json_schema(by_alias=True)
    content = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": SCHEMA}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
