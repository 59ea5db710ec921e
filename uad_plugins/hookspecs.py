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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import typer

    from uad_plugins.artifacts import Run
    from uad_plugins.config import TrainConfig
    from uad_plugins.data.samples import Sample, SampleTable
    from uad_plugins.detector import Detector
    from uad_plugins.quantization.calibration import Calibration

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
            configured image size. Raises ``UadxError`` for options that contradict each other. The weights are named
            ``checkpoint`` when a training is resumed: then they come with its checkpoint, and nothing is fetched.
        load: Checkpoint path -> the trained module, without fetching anything.
        options: Pydantic model of the method's own options (the configuration section ``model.options``).
        recipe: Path of a YAML file with the method's defaults, or None. Where the plugin stands for several methods
            (``NAME:CLASS``), a folder with ``CLASS.yaml`` for each that needs other defaults than the schema's.
        backbones: Function that returns the backbone names the method takes; None when it has no backbone.
        supports: What else can be done with the trained model: any of ``export``, ``qat``.
        ratio_scale: A score of 0 means no deviation at all; False where the zero is arbitrary, as that of z-scores is.
    """

    name: str
    summary: str
    build: Callable[[TrainConfig], Any]
    load: Callable[[Path, TrainConfig], Any]
    options: type[BaseModel]
    recipe: Path | None = None
    backbones: Callable[[], list[str]] | None = None
    supports: frozenset[str] = frozenset()
    ratio_scale: bool = True


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
        exhaustive: Whether every image below the root is meant, so that the user is told of those that ``scan`` left out;
            False where somebody chose (an index file).
    """

    name: str
    summary: str
    recognise: Callable[[Path], float]
    scan: Callable[[Path], Iterable[Sample]]
    priority: int = 0
    exhaustive: bool = True


@dataclass(frozen=True)
class Requirement:
    """Something a backend needs on this machine.

    Attributes:
        module: Import name to look for.
        install: The command that provides it, to copy as it is.
        check: Runs after the module was found; returns None when usable, else the reason why not.
        needs: What no command provides, such as a device; shown beside the reason why it cannot be used.
    """

    module: str
    install: str
    check: Callable[[], str | None] | None = None
    needs: str = ""


class NoOptions(BaseModel):
    """A plugin without options of its own."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class QuantizationRequest:
    """What a backend is given.

    Attributes:
        run: The trained run.
        config: What it was trained with.
        module: The trained ``anomalib.models.AnomalibModule``, on the CPU, in evaluation.
        core: Its network as a ``torch.nn.Module``: normalised float32 ``(N, 3, H, W)`` to scores ``(N,)`` and maps
            ``(N, H, W)``.
        image_size: ``(height, width)`` in pixels.
        calibration: Normalised images, float32 ``(1, 3, H, W)`` each, made when asked for.
        table: Samples with the splits of the training; ``val`` was held out from it, ``test`` must not be used.
        options: The backend's own, validated.
        folder: Where to write the model's files. What a backend needs to continue may be kept below ``work``.
        seed: Of everything random.
        resume: Continue what a killed call has begun.
    """

    run: Run
    config: TrainConfig
    module: Any
    core: Any
    image_size: tuple[int, int]
    calibration: Calibration
    table: SampleTable
    options: Any
    folder: Path
    seed: int = 0
    resume: bool = False


@dataclass(frozen=True)
class QuantizationResult:
    """What a backend has made.

    Attributes:
        files: What was written to the folder, by name: ``model.onnx``, or ``model.xml`` and ``model.bin``, or all, and what
            else belongs to the result. Input of a model: one normalised image ``(1, 3, H, W)``; outputs in this order:
            score ``(1,)``, map ``(1, H, W)``.
        precision: ``int8``, ``fp16`` or ``fp32``.
        profile: Rules that the files are audited by: ``openvino``, ``tensorrt`` or ``float``.
        whole: Every convolution of the network is quantized; False for those that leave some in float on purpose.
        trained: Weights were trained on: the result is not expected to agree with FP32 to the last percent.
        details: What else is to be remembered, as plain data.
        calibration: What it was calibrated on, as plain data; None: what the request gave.
        complaints: What the backend itself finds wrong, in words: anything here rejects the result.
    """

    files: Sequence[str]
    precision: str
    profile: str
    whole: bool = True
    trained: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    complaints: Sequence[str] = ()


@dataclass(frozen=True)
class QuantizerPlugin:
    """A backend that turns a trained run into a quantized model.

    Calibration data, audit, comparison with FP32, thresholds and manifest are the same for all backends and done by
    ``uadx quantize``.

    Attributes:
        name: What ``--backend`` takes.
        summary: One line for listings.
        quantize: Writes the model's files and says what they are. Raises ``UadxError`` for what the user can put right.
        options: Pydantic model of the backend's own options (``--set``); every field has a default and a description.
        requires: What must be installed.
        supports: What the method must support (``ModelPlugin.supports``).
        calibrated: It takes calibration data; False: none is looked for. A function says so from the options.
    """

    name: str
    summary: str
    quantize: Callable[[QuantizationRequest], QuantizationResult]
    options: type[BaseModel] = NoOptions
    requires: tuple[Requirement, ...] = ()
    supports: frozenset[str] = frozenset({"export"})
    calibrated: bool | Callable[[Any], bool] = True


@dataclass(frozen=True)
class PackagingRequest:
    """What a target is given.

    Attributes:
        models: Exported model by format: ``onnx`` (``model.onnx``) and ``openvino`` (``model.xml``, the ``.bin`` beside it),
            one or both. Input: one normalised image, float32 ``(1, 3, H, W)``; first output the score ``(1,)``, second the
            map ``(1, H, W)``.
        image_size: ``(height, width)`` in pixels.
        mean: Of the RGB channels of images in 0..1, for normalising.
        std: The same.
        precision: ``int8``, ``fp16`` or ``fp32``.
        profile: Rules that a quantized graph follows: ``openvino``, ``tensorrt`` or ``float``.
        whole: Every convolution of the network is quantized.
        options: The target's own, validated.
        folder: Where to write the files of the bundle.
    """

    models: dict[str, Path]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    profile: str
    whole: bool
    options: Any
    folder: Path


@dataclass(frozen=True)
class PackagingResult:
    """What a target has written.

    Attributes:
        onnx: The model as ONNX, by its path below the folder; None: there is none.
        openvino: The same for OpenVINO (the ``.xml``).
        input_name: Name of the model's input.
        pixels: It takes 8-bit pixels, uint8 ``(1, H, W, 3)`` RGB, and normalises them itself; otherwise normalised float32
            ``(1, 3, H, W)``.
        outputs: Names of score and map.
        usage: How the bundle is run, in Markdown, for its model card; ``{bundle}`` stands for its name.
        checks: What the target's rules found wrong, by rule: an empty list for a rule that is kept. Anything found fails the
            deployment.
        details: What else is to be remembered, as plain data.
        notes: Lines that are shown to whoever deploys it.
    """

    input_name: str
    outputs: tuple[str, str]
    onnx: str | None = None
    openvino: str | None = None
    pixels: bool = False
    usage: str = ""
    checks: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TargetPlugin:
    """A device or server that a bundle is packaged for.

    Export, hashes, manifest, model card and verification are the same for all targets and done by ``uadx deploy``.

    Attributes:
        name: What ``--target`` takes.
        summary: One line for listings.
        package: Writes the target's files and says what they are. Raises ``UadxError`` for what the user can put right.
        options: Pydantic model of the target's own options (``--set``); every field has a default and a description.
        requires: What must be installed on the machine that packages.
    """

    name: str
    summary: str
    package: Callable[[PackagingRequest], PackagingResult]
    options: type[BaseModel] = NoOptions
    requires: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class RuntimePlugin:
    """An engine that executes models.

    Attributes:
        name: What ``--engine`` takes.
        summary: One line for listings.
        open: Folder of a station (run, quantized model or bundle), or file of a zipped bundle -> a ``Detector``; None when
            this engine does not take that kind. Raises ``EngineError`` when it does and cannot be used on this machine: the
            next engine is asked, unless the user has named this one.
        requires: What must be installed on the machine that runs it.
        priority: Decides between engines that can open the same folder; higher wins.
        preferred: Folder -> whether this engine is to be asked before all others, whatever their priorities; None: never.
    """

    name: str
    summary: str
    open: Callable[[Path], Detector | None]
    requires: tuple[Requirement, ...] = ()
    priority: int = 0
    preferred: Callable[[Path], bool] | None = None


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
