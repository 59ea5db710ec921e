"""The engine on disk and the sidecar that says what it was built from, with and for.

An engine runs on the GPU and the TensorRT version that built it. The sidecar ``model.engine.json`` holds both, the hash of
the ONNX file, the options, and the hash of the engine itself: where any of them differs the engine is built anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt as trt

from .building import BuildOptions, Note, build_plan
from .bundle import Bundle
from .devices import Gpu
from .files import RunnerError, sha256_of, write_atomically, write_json

SCHEMA = "uadx.engine/1"


@dataclass(frozen=True)
class EngineFiles:
    """Where the engine of a bundle lies.

    Attributes:
        folder: Holds the engine, its sidecar and the timing cache of each TensorRT version.
    """

    folder: Path

    @property
    def engine(self) -> Path:
        """The serialized engine."""
        return self.folder / "model.engine"

    @property
    def sidecar(self) -> Path:
        """What it was built from."""
        return self.folder / "model.engine.json"

    @property
    def timing_cache(self) -> Path:
        """Timings of earlier builds."""
        return self.folder / f"timing-{trt.__version__}.cache"


def ensure_engine(
    bundle: Bundle, files: EngineFiles, gpu: Gpu, note: Note, options: BuildOptions | None = None, force: bool = False
) -> bool:
    """Build the engine unless the one on disk fits.

    Args:
        bundle: What to build.
        files: Where to.
        gpu: The GPU in use.
        note: Told what the user should know.
        options: What is asked for; None takes those of the engine on disk, or the defaults.
        force: Build in any case.

    Returns:
        Whether it was built.

    Raises:
        RunnerError: It cannot be built or written.
    """
    written = _read_sidecar(files.sidecar)
    options = options or _options_of(written)
    wanted = _wanted(bundle, gpu, options)
    reason = "asked for" if force else _difference(written, wanted, files.engine)
    if reason is None:
        return False
    note(f"building the engine ({reason}); this takes minutes on a small device")
    plan = build_plan(bundle.onnx, files.engine, options, files.timing_cache, note, bundle.folder)
    write_atomically(files.engine, plan.content)
    write_json(files.sidecar, {**wanted, "engine_sha256": sha256_of(files.engine), "trtexec": plan.trtexec})
    note(f"engine: {files.engine}")
    note(f"the same with trtexec, in {bundle.folder}: {plan.trtexec}")
    return True


def fits(bundle: Bundle, files: EngineFiles, gpu: Gpu) -> bool:
    """Tell whether the engine on disk can be read and need not be built anew."""
    written = _read_sidecar(files.sidecar)
    try:
        return _difference(written, _wanted(bundle, gpu, _options_of(written)), files.engine) is None
    except RunnerError:
        return False


def load_engine(files: EngineFiles) -> Any:
    """Load the engine on disk; it must fit, see ``ensure_engine``.

    Raises:
        RunnerError: TensorRT does not take it.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    core = _options_of(_read_sidecar(files.sidecar)).dla_core
    if core is not None:
        runtime.DLA_core = core
    engine = runtime.deserialize_cuda_engine(files.engine.read_bytes())
    if engine is None:
        raise RunnerError(
            f"{files.engine}: TensorRT {trt.__version__} cannot load it; build it anew: runner.py build --force"
        )
    return engine


def _wanted(bundle: Bundle, gpu: Gpu, options: BuildOptions) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "tensorrt": trt.__version__,
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "onnx_sha256": bundle.onnx_sha256,
        "options": options.as_dict(),
    }


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _options_of(sidecar: dict[str, Any]) -> BuildOptions:
    try:
        return BuildOptions.from_dict(sidecar.get("options", {}))
    except TypeError:
        return BuildOptions()


def _difference(written: dict[str, Any], wanted: dict[str, Any], engine: Path) -> str | None:
    if not written or not engine.is_file():
        return "there is none yet"
    for key, value in wanted.items():
        if written.get(key) != value:
            return f"{key} was {written.get(key)}, is {value}"
    if sha256_of(engine) != written.get("engine_sha256"):
        return "the file of the engine has changed"
    return None
