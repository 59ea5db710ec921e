"""The contract with plugins, in one file: read it top to bottom to write one.

A plugin is a module (or object) with functions marked ``@hookimpl``. It is found through an entry point in the group
``uadx.plugins``::

    [project.entry-points."uadx.plugins"]
    my-plugin = "my_package.uadx_plugin"

Each hook returns a list of the small descriptions defined below. A description carries its own name; two plugins that
claim the same name of the same kind are an error naming both. Plugin modules are imported when the program starts, so
they must be light: import torch and the like inside the functions a description points to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer
    from pydantic import BaseModel

    from uad_plugins.config import TrainConfig
    from uad_plugins.data.samples import Sample
    from uad_plugins.detector import Detector

ENTRY_POINT_GROUP = "uadx.plugins"

hookspec = pluggy.HookspecMarker("uadx")
hookimpl = pluggy.HookimplMarker("uadx")


@dataclass(frozen=True)
class ModelPlugin:
    """A method that can be trained.

    Attributes:
        name: What ``--model`` takes.
        summary: One line for listings.
        build: Resolved configuration -> an untrained ``anomalib.models.AnomalibModule`` whose pre-processor has the
            configured image size. Raises ``UadxError`` for options that contradict each other.
        load: Checkpoint path -> the trained module, without fetching anything.
        options: Pydantic model of the method's own options (the configuration section ``model.options``).
        recipe: Path of a YAML file with the method's defaults, or None.
        backbones: Function that returns the backbone names the method takes; None when it has no backbone.
        supports: What else can be done with the trained model: any of ``export``, ``qat``.
    """

    name: str
    summary: str
    build: Callable[[TrainConfig], Any]
    load: Callable[[Path, TrainConfig], Any]
    options: type[BaseModel]
    recipe: Path | None = None
    backbones: Callable[[], list[str]] | None = None
    supports: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayoutPlugin:
    """A way in which images lie in folders.

    Attributes:
        name: What ``--layout`` takes.
        summary: One line for listings.
        recognise: Root -> confidence in 0..1 that the folder (or file) has this layout; 0 for certainly not. Must look at
            directory entries alone and open no image.
        scan: Root -> its samples, in any order, without opening an image.
        priority: Decides between layouts that are equally confident; higher wins.
    """

    name: str
    summary: str
    recognise: Callable[[Path], float]
    scan: Callable[[Path], Iterable[Sample]]
    priority: int = 0


@dataclass(frozen=True)
class Requirement:
    """Something a backend needs on this machine.

    Attributes:
        module: Import name to look for.
        install: The command that provides it.
        check: Runs after the module was found; returns None when usable, else the reason why not.
    """

    module: str
    install: str
    check: Callable[[], str | None] | None = None


@dataclass(frozen=True)
class QuantizerPlugin:
    """A backend that turns a trained run into a quantized model.

    Attributes:
        name: What ``--backend`` takes.
        summary: One line for listings.
        quantize: Keyword arguments ``run``, ``out``, ``calibration``, ``samples`` and the backend's options -> the folder
            written.
        requires: What must be installed.
    """

    name: str
    summary: str
    quantize: Callable[..., Path]
    requires: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class TargetPlugin:
    """A device that a bundle is packaged for.

    Attributes:
        name: What ``--target`` takes.
        summary: One line for listings.
        package: Keyword arguments ``source`` (a run or a quantized model), ``out`` and the target's options -> the bundle.
        requires: What must be installed on the machine that packages.
    """

    name: str
    summary: str
    package: Callable[..., Path]
    requires: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class RuntimePlugin:
    """An engine that executes models.

    Attributes:
        name: What ``--engine`` takes.
        summary: One line for listings.
        open: Folder of a station (run, quantized model or bundle) -> a ``Detector``; None when this engine does not take
            that kind of folder.
        requires: What must be installed on the machine that runs it.
        priority: Decides between engines that can open the same folder; higher wins.
    """

    name: str
    summary: str
    open: Callable[[Path], Detector | None]
    requires: tuple[Requirement, ...] = ()
    priority: int = 0


@dataclass(frozen=True)
class CommandPlugin:
    """A subcommand of ``uadx``.

    Attributes:
        name: The word after ``uadx``.
        summary: One line for ``uadx --help``.
        app: A Typer app. An app with one command and no callback is added as that command.
    """

    name: str
    summary: str
    app: typer.Typer


@hookspec
def uadx_register_models() -> list[ModelPlugin]:
    """Return the methods that this plugin can train."""
    return []


@hookspec
def uadx_register_layouts() -> list[LayoutPlugin]:
    """Return the data layouts that this plugin can read."""
    return []


@hookspec
def uadx_register_quantizers() -> list[QuantizerPlugin]:
    """Return the quantization backends of this plugin."""
    return []


@hookspec
def uadx_register_targets() -> list[TargetPlugin]:
    """Return the deployment targets of this plugin."""
    return []


@hookspec
def uadx_register_runtimes() -> list[RuntimePlugin]:
    """Return the inference engines of this plugin."""
    return []


@hookspec
def uadx_register_commands() -> list[CommandPlugin]:
    """Return the subcommands that this plugin adds to ``uadx``."""
    return []


KINDS: dict[str, tuple[str, type[Any]]] = {
    "model": ("uadx_register_models", ModelPlugin),
    "layout": ("uadx_register_layouts", LayoutPlugin),
    "quantizer": ("uadx_register_quantizers", QuantizerPlugin),
    "target": ("uadx_register_targets", TargetPlugin),
    "runtime": ("uadx_register_runtimes", RuntimePlugin),
    "command": ("uadx_register_commands", CommandPlugin),
}
"""Kind of plugin -> (hook, class of its descriptions)."""
