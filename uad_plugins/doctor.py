"""What can be used on this machine, and what would make the rest usable."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from uad_plugins.cpu import cores, cpu_flags
from uad_plugins.errors import reason_of
from uad_plugins.hookspecs import Requirement
from uad_plugins.registry import installed, registry


@dataclass(frozen=True)
class Diagnosis:
    """Whether one thing can be used.

    Attributes:
        kind: ``package``, or the kind of a plugin.
        name: Its name.
        usable: Whether it can be used here.
        detail: Version, or the reason why not.
        fix: The command that would make it usable; empty when it is.
    """

    kind: str
    name: str
    usable: bool
    detail: str
    fix: str = ""


def _torch() -> str | None:
    torch = importlib.import_module("torch")
    torch.zeros(1).add_(1)
    return None


def _openvino() -> str | None:
    devices = importlib.import_module("openvino").Core().available_devices
    return None if "CPU" in devices else f"no CPU device (found: {', '.join(devices) or 'none'})"


def _onnxruntime() -> str | None:
    providers = importlib.import_module("onnxruntime").get_available_providers()
    return None if "CPUExecutionProvider" in providers else "no CPU provider"


def _tensorrt() -> str | None:
    trt = importlib.import_module("tensorrt")
    return None if trt.Builder(trt.Logger(trt.Logger.ERROR)) is not None else "no builder"


def _pycuda() -> str | None:
    driver = importlib.import_module("pycuda.driver")
    driver.init()
    return None if driver.Device.count() > 0 else "no NVIDIA GPU"


PACKAGES: tuple[Requirement, ...] = (
    Requirement("torch", "pip install 'uadx[train]'", _torch),
    Requirement("anomalib", "pip install 'uadx[train]'"),
    Requirement("lightning", "pip install 'uadx[train]'"),
    Requirement("timm", "pip install 'uadx[train]'"),
    Requirement("openvino", "pip install 'uadx[openvino]'", _openvino),
    Requirement("nncf", "pip install 'uadx[openvino]'"),
    Requirement("onnx", "pip install 'uadx[onnx]'"),
    Requirement("onnxruntime", "pip install 'uadx[onnx]'", _onnxruntime),
    Requirement("tensorrt", "pip install 'uadx[tensorrt]'", _tensorrt, needs="an NVIDIA GPU; JetPack brings it"),
    Requirement("pycuda", "pip install 'uadx[tensorrt]'", _pycuda, needs="an NVIDIA GPU"),
)
"""What backends are built on, with a small trial of each that needs hardware or libraries."""


def examine(requirement: Requirement) -> Diagnosis:
    """Find out whether a requirement is met: is it installed, and does its trial succeed."""
    if not installed(requirement.module):
        return _unusable(requirement, "not installed")
    try:
        version = importlib.metadata.version(requirement.module)
    except importlib.metadata.PackageNotFoundError:
        version = "installed"
    try:
        reason = requirement.check() if requirement.check else None
    except Exception as error:
        # A broken driver or library can raise anything at all.
        reason = f"{type(error).__name__}: {reason_of(error)}"
    if reason is not None:
        return _unusable(requirement, f"{version}: {reason}")
    return Diagnosis("package", requirement.module, True, version)


def _unusable(requirement: Requirement, reason: str) -> Diagnosis:
    needs = f" (needs {requirement.needs})" if requirement.needs else ""
    return Diagnosis("package", requirement.module, False, reason + needs, requirement.install)


def diagnose() -> list[Diagnosis]:
    """Examine the packages, then every engine and backend that is registered."""
    # Several plugins need the same packages, whose trials take a while.
    examined = cache(examine)
    found = [examined(requirement) for requirement in PACKAGES]
    for kind in ("runtime", "quantizer", "target"):
        for item in registry().items(kind):
            missing = [d for d in map(examined, map(_with_trial, item.requires)) if not d.usable]
            if missing:
                detail = "; ".join(f"{d.name} {d.detail}" for d in missing)
                found.append(Diagnosis(kind, item.name, False, detail, "; ".join(dict.fromkeys(d.fix for d in missing))))
            else:
                found.append(Diagnosis(kind, item.name, True, item.summary))
    found += [
        Diagnosis(
            "plugin",
            plugin.name,
            False,
            plugin.reason,
            f"pip install --upgrade {plugin.distribution}" if plugin.distribution else "unset UADX_LOAD_PLUGINS",
        )
        for plugin in registry().broken
    ]
    return found


def _with_trial(requirement: Requirement) -> Requirement:
    """Give a plugin's requirement the trial and the needs of the package where it says nothing of its own."""
    known = next((package for package in PACKAGES if package.module == requirement.module), requirement)
    return replace(requirement, check=requirement.check or known.check, needs=requirement.needs or known.needs)


def machine() -> dict[str, Any]:
    """Return facts of the machine that decide how fast things run."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": cores(),
        "processor": platform.processor() or platform.machine(),
    }
    optional: list[tuple[str, Callable[[], Any]]] = [("cpu_flags", cpu_flags), ("gpus", _gpus)]
    for name, find in optional:
        value = find()
        if value:
            facts[name] = value
    return facts


def _gpus() -> list[str]:
    if not installed("torch"):
        return []
    try:
        cuda = importlib.import_module("torch").cuda
    except Exception:
        # A broken torch can raise anything; its own line says what.
        return []
    return [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
