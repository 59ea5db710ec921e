"""What a quantized model is on disk. No torch in here: it is read on the edge too."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uad_plugins.artifacts import Run, read_json, sha256_of, versions, write_json
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.thresholds import Thresholds

MANIFEST = "quantized.json"
SCHEMA = "uadx.quantized/1"
AGAIN = "copy the result again, or quantize again"
"""What to do where a file of it is damaged."""


class QuantizedManifest(BaseModel):
    """What ``quantized.json`` says of a quantized model.

    Attributes:
        status: ``quantizing`` until everything is written; ``rejected`` when the audit or the referee found it wanting.
        model: Method of the run.
        categories: Products the run was trained on.
        image_size: ``(height, width)`` of the input in pixels.
        mean: Of the RGB channels of images in 0..1, for normalising.
        std: The same.
        backend: What quantized it.
        precision: ``int8``, ``fp16`` or ``fp32``.
        profile: Rules that the graph follows: ``openvino``, ``tensorrt`` or ``float``.
        whole: Every convolution of the network is quantized.
        options: Of the backend.
        calibration: Source, images and seed.
        source: The run, with the SHA-256 of its checkpoint, and how its data is split.
        files: SHA-256 and bytes of each model file, by name.
        size: Bytes before and after, by format, and their ratio.
        audit: What is wrong, by file and rule; empty lists for rules that are kept.
        placement: What is quantized, by file: number of convolutions, and of those with INT8 weights, names of those left in
            float, number of quantized activations.
        agreement: How scores and maps agree with FP32, and engines with one another.
        auroc: By category FP32, quantized and the drop, where labelled images were given.
        details: What else the backend has to say.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    schema_: str = Field(SCHEMA, alias="schema")
    status: Literal["quantizing", "finished", "rejected"] = "quantizing"
    model: str
    categories: list[str]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    backend: str
    precision: str = ""
    profile: str = ""
    whole: bool = True
    options: dict[str, Any] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    source: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, dict[str, Any]] = Field(default_factory=dict)
    size: dict[str, Any] = Field(default_factory=dict)
    audit: dict[str, dict[str, list[str]]] = Field(default_factory=dict)
    placement: dict[str, dict[str, Any]] = Field(default_factory=dict)
    agreement: dict[str, Any] = Field(default_factory=dict)
    auroc: dict[str, Any] | None = None
    details: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=versions)
    command: list[str] = Field(default_factory=lambda: list(sys.argv))


@dataclass(frozen=True)
class Quantized:
    """A quantized model on disk.

    Attributes:
        folder: Where it lies.

    The folder holds ``quantized.json`` (manifest), ``thresholds.json`` and the model: ``model.onnx``, or ``model.xml`` with
    ``model.bin``, or both; and ``evaluation.json`` once it has been evaluated.
    """

    folder: Path

    @property
    def thresholds_file(self) -> Path:
        """Decision thresholds."""
        return self.folder / "thresholds.json"

    @property
    def onnx(self) -> Path:
        """The ONNX model."""
        return self.folder / "model.onnx"

    @property
    def xml(self) -> Path:
        """The OpenVINO model; its weights lie beside it."""
        return self.folder / "model.xml"

    def manifest(self) -> QuantizedManifest:
        """Read the manifest.

        Raises:
            UadxError: It is missing, damaged, or of another version of the schema.
        """
        path = self.folder / MANIFEST
        content = read_json(path, AGAIN)
        schema = content.get("schema") if isinstance(content, Mapping) else None
        if schema != SCHEMA:
            raise UadxError(f"{path}: schema '{schema}' is not known to this version", "update uadx, or quantize again")
        try:
            return QuantizedManifest.model_validate(content)
        except ValidationError as error:
            raise UadxError(f"{path}: damaged: {error.errors()[0]['msg']}", AGAIN) from error

    def write_manifest(self, manifest: QuantizedManifest) -> None:
        """Write the manifest."""
        # pydantic's own JSON would refuse names in bytes that are not UTF-8.
        write_json(self.folder / MANIFEST, manifest.model_dump(by_alias=True))

    def thresholds(self) -> Thresholds:
        """Read the decision thresholds."""
        return Thresholds.read(self.thresholds_file)

    def source(self) -> dict[str, Any]:
        """Return where it came from, as ``Run.source`` of its run."""
        return self.manifest().source

    def check_files(self, manifest: QuantizedManifest) -> None:
        """Compare the model's files with the manifest.

        Raises:
            UadxError: One is missing or has changed.
        """
        for name, facts in manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise UadxError(f"{path}: is missing", "copy the whole folder, or quantize again")
            if sha256_of(path) != facts["sha256"]:
                raise UadxError(f"{path}: is not the file that was written", "its content has changed; quantize again")

    @classmethod
    def open(cls, folder: Path) -> Quantized:
        """Open a finished quantized model.

        Raises:
            UadxError: The folder holds none, or one that is unfinished or was rejected.
        """
        station = cls(folder.expanduser())
        if not (station.folder / MANIFEST).is_file():
            raise UadxError(f"{folder}: not a quantized model (no {MANIFEST})", "give the folder that 'uadx quantize' wrote")
        status = station.manifest().status
        if status == "rejected":
            raise UadxError(f"{folder}: was rejected when it was quantized", f"see 'audit' and 'agreement' in {MANIFEST}")
        if status != "finished":
            raise UadxError(f"{folder}: its quantization is not finished", "run 'uadx quantize' again with --resume")
        return station


def open_trained(folder: Path) -> Run | Quantized:
    """Open what was trained: a finished run, or a quantized model.

    Raises:
        UadxError: It is neither, or unfinished, or rejected.
    """
    return Quantized.open(folder) if (folder.expanduser() / MANIFEST).is_file() else Run.open(folder)
