"""Registers the built-in methods, and the engine that runs a trained run with torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from uad_plugins.config import TrainConfig, recipe_path
from uad_plugins.errors import UsageError, missing_extra
from uad_plugins.hookspecs import ModelPlugin, Requirement, RuntimePlugin, hookimpl
from uad_plugins.models.options import ReverseDistillationOptions, StfpmOptions
from uad_plugins.models.uninformed_students.options import UninformedStudentsOptions

if TYPE_CHECKING:
    from uad_plugins.detector import Detector


class AnyOptions(BaseModel):
    """Options that anomalib's own constructor checks."""

    model_config = ConfigDict(extra="allow")


def _common(config: TrainConfig) -> dict[str, Any]:
    from anomalib.models import AnomalibModule

    arguments: dict[str, Any] = {
        "weights": config.model.weights,
        "optimizer": config.optimizer.model_dump(mode="json"),
        "pre_processor": AnomalibModule.configure_pre_processor(config.data.size),
        "visualizer": False,
    }
    if config.model.backbone is not None:
        arguments["backbone"] = config.model.backbone
    if config.model.layers is not None:
        arguments["layers"] = config.model.layers
    return arguments


def _build_stfpm(config: TrainConfig) -> Any:
    options = StfpmOptions.model_validate(config.model.options)
    with _train_extra():
        from uad_plugins.models.stfpm import Stfpm

        return Stfpm(**options.model_dump(), **_common(config))


def _load_stfpm(checkpoint: Path, _config: TrainConfig) -> Any:
    with _train_extra():
        from uad_plugins.models.stfpm import Stfpm

        return Stfpm.load_from_checkpoint(checkpoint, map_location="cpu")


def _build_reverse_distillation(config: TrainConfig) -> Any:
    options = ReverseDistillationOptions.model_validate(config.model.options)
    if any(side % 32 for side in config.data.size):
        height, width = config.data.size
        raise UsageError(
            f"Reverse Distillation takes image sizes that are multiples of 32, not {height}x{width}",
            f"use {round(height / 32) * 32 or 32}",
        )
    with _train_extra():
        from uad_plugins.models.reverse_distillation import ReverseDistillation

        return ReverseDistillation(**options.model_dump(), **_common(config))


def _load_reverse_distillation(checkpoint: Path, _config: TrainConfig) -> Any:
    with _train_extra():
        from uad_plugins.models.reverse_distillation import ReverseDistillation

        return ReverseDistillation.load_from_checkpoint(checkpoint, map_location="cpu")


def _build_uninformed_students(config: TrainConfig) -> Any:
    options = UninformedStudentsOptions.model_validate(config.model.options)
    largest, side = max(options.patch_sizes), min(config.data.size)
    if side < largest:
        raise UsageError(
            f"Uninformed Students with patches of {largest}x{largest} pixels cannot take images of {side}",
            "use a larger data.image_size, or smaller model.options.patch_sizes",
        )
    if config.model.layers is not None:
        raise UsageError("model.layers: Uninformed Students has none", "see model.options.patch_sizes for its scales")
    with _train_extra():
        from uad_plugins.models.uninformed_students.lightning_model import UninformedStudents

        return UninformedStudents(**options.model_dump(mode="json"), **_common(config))


def _load_uninformed_students(checkpoint: Path, _config: TrainConfig) -> Any:
    with _train_extra():
        from uad_plugins.models.uninformed_students.lightning_model import UninformedStudents

        return UninformedStudents.load_from_checkpoint(checkpoint, map_location="cpu")


def _build_anomalib(config: TrainConfig) -> Any:
    with _train_extra():
        from uad_plugins.models.anomalib_models import build

        model, records = build(config)
        model.weights_record = records[0] if records else None
        return model


def _load_anomalib(checkpoint: Path, config: TrainConfig) -> Any:
    with _train_extra():
        from uad_plugins.models.anomalib_models import load

        return load(checkpoint, config)


def _timm_resnets() -> list[str]:
    from uad_plugins.models.backbones import architectures

    return architectures()


def _reverse_distillation_backbones() -> list[str]:
    from uad_plugins.models.reverse_distillation import BACKBONES

    return list(BACKBONES)


@contextmanager
def _train_extra(feature: str = "training") -> Iterator[None]:
    """Turn a missing package of the ``train`` extra into the line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(feature, "train", error) from error


@hookimpl
def uadx_register_models() -> list[ModelPlugin]:
    """Return STFPM, Reverse Distillation, Uninformed Students, and the door to anomalib's other image models."""
    return [
        ModelPlugin(
            name="stfpm",
            summary="Student-Teacher Feature Pyramid Matching (arXiv 2103.04257)",
            build=_build_stfpm,
            load=_load_stfpm,
            options=StfpmOptions,
            recipe=recipe_path("stfpm"),
            backbones=_timm_resnets,
            supports=frozenset({"export", "qat"}),
        ),
        ModelPlugin(
            name="reverse_distillation",
            summary="Reverse Distillation from One-Class Embedding (arXiv 2201.10703)",
            build=_build_reverse_distillation,
            load=_load_reverse_distillation,
            options=ReverseDistillationOptions,
            recipe=recipe_path("reverse_distillation"),
            backbones=_reverse_distillation_backbones,
            supports=frozenset({"export", "qat"}),
        ),
        ModelPlugin(
            name="uninformed_students",
            summary="Uninformed Students: ensembles that regress patch descriptors (arXiv 1911.02357)",
            build=_build_uninformed_students,
            load=_load_uninformed_students,
            options=UninformedStudentsOptions,
            recipe=recipe_path("uninformed_students"),
            backbones=_timm_resnets,
            supports=frozenset({"export", "qat"}),
            ratio_scale=False,
        ),
        ModelPlugin(
            name="anomalib",
            summary="any other image model of anomalib, as anomalib:CLASS",
            build=_build_anomalib,
            load=_load_anomalib,
            options=AnyOptions,
            recipe=recipe_path("stfpm").parent / "anomalib",
        ),
    ]


def _open_run(folder: Path) -> Detector | None:
    from uad_plugins.artifacts import MANIFEST

    if not (folder / MANIFEST).is_file():
        return None
    with _train_extra("a trained run"):
        from uad_plugins.models.torch_detector import TorchDetector

        return TorchDetector.open(folder)


@hookimpl
def uadx_register_runtimes() -> list[RuntimePlugin]:
    """Return the torch engine."""
    modules = ("torch", "torchvision", "lightning", "timm", "anomalib")
    return [
        RuntimePlugin(
            name="torch",
            summary="runs a trained run",
            open=_open_run,
            requires=tuple(Requirement(module, "pip install 'uadx[train]'") for module in modules),
        )
    ]
