"""The stations on disk: what a run holds, and writing files so that no half-written one is ever read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uad_plugins.config import TrainConfig, read_yaml, validate
from uad_plugins.errors import UadxError, reason_of
from uad_plugins.registry import use_plugins

MANIFEST = "run.json"
SCHEMA = "uadx.run/1"
AGAIN = "copy the run again, or train again"
"""What to do where a file of a run is damaged."""

# It can only be read by setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without an error.

    The content reaches the disk before the name does: after a power cut there is the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut off: with what is added here a long name would become too long for the file system.
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:32]}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)  # noqa: PTH105
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    File names may hold bytes that are not UTF-8, which Python keeps as lone surrogates. They are written as JSON's escapes:
    the text stays valid UTF-8, and a reader of JSON gets the name back as it was.
    """
    write_bytes(path, content.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, hint: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        hint: What to do where it cannot be read.

    Raises:
        UadxError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UadxError(f"{path}: no such file", hint) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UadxError(f"{path}: not valid JSON: {error}", hint) from error


def cache_folder(name: str) -> Path:
    """Return the folder for files that can be made again: below ``UADX_CACHE``, or the user's cache folder."""
    base = os.environ.get("UADX_CACHE")
    root = Path(base).expanduser() if base else Path(platformdirs.user_cache_dir("uadx", appauthor=False))
    if not base and not root.is_absolute():
        # Without a home folder a path that begins with "~" is left: it would land in the working directory.
        raise FileNotFoundError(errno.ENOENT, "no home folder for the cache", str(root))
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a result."""
    names = ["uadx", "torch", "torchvision", "lightning", "anomalib", "timm", "kornia", "torchmetrics", "numpy", "pillow"]
    names += ["nncf", "openvino", "onnx", "onnxruntime"]
    found = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    installed = {dist.name.lower(): dist.version for dist in metadata.distributions() if dist.name}
    found |= {name: installed[name] for name in names if name in installed}
    return found


class RunManifest(BaseModel):
    """What ``run.json`` says of a run."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    schema_: str = Field(SCHEMA, alias="schema")
    status: Literal["training", "finished"] = "training"
    model: str
    categories: list[str]
    image_size: tuple[int, int]
    data: dict[str, Any]
    weights: dict[str, Any] | None = None
    versions: dict[str, str] = Field(default_factory=versions)
    command: list[str] = Field(default_factory=lambda: list(sys.argv))
    earlier: list[dict[str, Any]] = Field(default_factory=list, description="Versions and command before each resumption.")
    checkpoint_sha256: str | None = None
    method: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A training on disk.

    Attributes:
        folder: Where it lies.

    The folder holds ``run.json`` (manifest), ``config.yaml`` (resolved configuration), ``model.ckpt`` (the best checkpoint),
    ``last.ckpt`` (where ``--resume`` goes on), ``thresholds.json``, ``metrics.json``, ``skipped.json``, ``split.json``
    (what was held out from training), ``logs/``, and ``evaluation.json`` once it has been evaluated.
    """

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The best checkpoint, an anomalib checkpoint."""
        return self.folder / "model.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last whole epoch, with the state of the optimizer."""
        return self.folder / "last.ckpt"

    @property
    def thresholds_file(self) -> Path:
        """Decision thresholds."""
        return self.folder / "thresholds.json"

    @property
    def metrics_file(self) -> Path:
        """Figures of the training."""
        return self.folder / "metrics.json"

    @property
    def split_file(self) -> Path:
        """What was held out from training."""
        return self.folder / "split.json"

    def held_out(self) -> set[str] | None:
        """Return the images held out from training, relative to the data; None: the run is older than this note.

        Raises:
            UadxError: The note is damaged.
        """
        if not self.split_file.is_file():
            return None
        content = read_json(self.split_file, AGAIN)
        if not isinstance(content, Mapping) or not isinstance(content.get("val"), list):
            raise UadxError(f"{self.split_file}: damaged: no list 'val'", AGAIN)
        return set(content["val"])

    @property
    def skipped_file(self) -> Path:
        """Images left out, and why."""
        return self.folder / "skipped.json"

    @property
    def config_file(self) -> Path:
        """Resolved configuration."""
        return self.folder / "config.yaml"

    def manifest(self) -> RunManifest:
        """Read the manifest.

        Raises:
            UadxError: It is missing, damaged, or of a newer version of the schema.
        """
        path = self.folder / MANIFEST
        content = read_json(path, AGAIN)
        schema = content.get("schema") if isinstance(content, Mapping) else None
        if schema != SCHEMA:
            raise UadxError(f"{path}: schema '{schema}' is not known to this version", "update uadx, or train again")
        try:
            return RunManifest.model_validate(content)
        except ValidationError as error:
            raise UadxError(f"{path}: damaged: {error.errors()[0]['msg']}", AGAIN) from error

    def write_manifest(self, manifest: RunManifest) -> None:
        """Write the manifest."""
        # pydantic's own JSON would refuse names in bytes that are not UTF-8.
        write_json(self.folder / MANIFEST, manifest.model_dump(by_alias=True))

    def config(self) -> TrainConfig:
        """Read the resolved configuration, loading the plugin modules that it names."""
        config = validate(read_yaml(self.config_file))
        use_plugins(config.plugins)
        return config

    def checkpoint_sha256(self) -> str:
        """Return the SHA-256 of the checkpoint that was trained, as the manifest says, or else of the file."""
        return self.manifest().checkpoint_sha256 or sha256_of(self.checkpoint)

    def source(self) -> dict[str, Any]:
        """Return what later stations note of where they came from: the checkpoint, and how the data was split."""
        config, manifest, held_out = self.config(), self.manifest(), self.held_out()
        return {
            "run": str(self.folder.absolute()),
            "checkpoint_sha256": self.checkpoint_sha256(),
            "data": manifest.data.get("root"),
            "fingerprint": manifest.data.get("fingerprint"),
            "layout": config.data.layout,
            "categories": config.data.categories,
            "products": manifest.categories,
            "val_fraction": config.data.val_fraction,
            "seed": config.split_seed,
            "held_out": None if held_out is None else sorted(held_out),
            "target_fpr": config.thresholds.target_fpr,
        }

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open a finished run.

        Raises:
            UadxError: The folder is no run, or its training is not finished.
        """
        run = cls(folder.expanduser())
        if not run.folder.is_dir():
            raise UadxError(f"{folder}: no such folder", "give the folder that 'uadx train --out' wrote")
        if not (run.folder / MANIFEST).is_file():
            raise UadxError(f"{folder}: not a run (no {MANIFEST})", "give the folder that 'uadx train --out' wrote")
        if run.manifest().status != "finished":
            raise UadxError(f"{folder}: its training is not finished", "finish it with 'uadx train … --resume'")
        return run


def checked(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Read a file, turning damage into one line that names it."""
    try:
        return reader(path)
    except UadxError:
        raise
    except Exception as error:
        if not path.exists():
            raise UadxError(f"{path}: no such file", "copy again what it belongs to") from error
        # torch and zipfile raise many kinds for a damaged file.
        raise UadxError(
            f"{path}: cannot be read: {reason_of(error)}", "the file is damaged or of another version"
        ) from error
