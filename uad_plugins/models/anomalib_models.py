"""Any other image model of anomalib, by class name: ``--model anomalib:Padim``."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import anomalib.models
import timm
from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.models import AnomalibModule
from anomalib.utils.path import get_pretrained_weights_dir
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet

from uad_plugins.config import TrainConfig
from uad_plugins.errors import UadxError, UsageError, reason_of, unknown_name
from uad_plugins.models.backbones import (
    CHECKPOINT,
    HUB,
    WAYS_OUT,
    alias,
    architectures,
    backbone_weights,
    hub_record,
    load_backbone,
    require_hub,
)

ONE_BY_ONE = frozenset({"EfficientAd"})
"""Classes that refuse, once training has begun, batches of more than one image."""


def classes() -> dict[str, type[AnomalibModule]]:
    """Return anomalib's image models by class name."""
    members = {
        name: getattr(anomalib.models, name, None) for name in getattr(anomalib.models, "__all__", dir(anomalib.models))
    }
    return {
        name: member
        for name, member in members.items()
        if inspect.isclass(member)
        and issubclass(member, AnomalibModule)
        and not inspect.isabstract(member)
        and ".image." in member.__module__
    }


def find(name: str) -> type[AnomalibModule]:
    """Return the class that ``anomalib:CLASS`` names.

    Raises:
        UsageError: No class is named, or there is none of that name.
    """
    _, _, class_name = name.partition(":")
    known = classes()
    if class_name not in known:
        raise unknown_name("anomalib model", class_name or "(none named)", known)
    return known[class_name]


def build(config: TrainConfig) -> tuple[AnomalibModule, list[Any]]:
    """Build an untrained model.

    Returns:
        The model and the records of the backbone weights it took.

    Raises:
        UadxError: The method is not trained on normal images, or its constructor failed.
        UsageError: An option that its constructor does not take.
    """
    cls = find(config.model.name)
    weights = config.model.weights
    if cls.__name__ in ONE_BY_ONE and config.data.train_batch_size != 1:
        raise UsageError(
            f"{config.model.name} is trained with one image at a time, not {config.data.train_batch_size}",
            "leave the batch size out, or set data.train_batch_size=1",
        )
    with backbone_weights(weights) as records:
        model = _construct(cls, config, weights)
        if weights not in (HUB, CHECKPOINT) and "pre_trained" in inspect.signature(cls.__init__).parameters:
            _fill_extractors(model, weights)
    if weights not in (HUB, CHECKPOINT) and not records:
        raise UadxError(f"{cls.__name__} has no backbone that could be given weights", "leave --weights out")
    if weights == HUB:
        fetched = [hub_record(backbone, str(model.hparams.get("backbone"))) for backbone in _backbones(model)]
        records = fetched[:1]
    if model.learning_type != LearningType.ONE_CLASS:
        raise UadxError(
            f"{cls.__name__} is a {model.learning_type.value} method: it does not learn from images of good parts",
            "choose a one-class method, for example anomalib:Padim",
        )
    _fetch(model, config)
    return model, records


def _fetch(model: AnomalibModule, config: TrainConfig) -> None:
    """Have fetched now what a method would fetch when training begins: an old run may be gone by then.

    Raises:
        UadxError: It cannot be had.
    """
    if hasattr(model, "prepare_pretrained_model"):
        try:
            model.prepare_pretrained_model()
        except Exception as error:
            raise UadxError(
                f"{config.model.name} cannot get its pretrained weights: {reason_of(error)}",
                f"fetch them on a machine with a network, and copy {get_pretrained_weights_dir()} to this one",
            ) from error
    if hasattr(model, "prepare_imagenette_data"):
        folder = Path(model.imagenet_dir)
        there = folder.is_dir()
        try:
            model.prepare_imagenette_data(config.data.size)
        except Exception as error:
            if not there:
                # What is left of a download would be taken for the data next time.
                shutil.rmtree(folder, ignore_errors=True)
            raise UadxError(
                f"{config.model.name} cannot get the natural images that it trains with in {folder}: {reason_of(error)}",
                "name a folder of such images (FOLDER/ANY_NAME/*.jpg): --set model.options.imagenet_dir=FOLDER",
            ) from error


def load(checkpoint: Path, config: TrainConfig) -> AnomalibModule:
    """Load a trained model without fetching anything that the checkpoint already has."""
    cls = find(config.model.name)
    options = _options(cls, config, CHECKPOINT)
    if "pre_processor" in inspect.signature(cls.__init__).parameters:
        # Some networks are as large as their input.
        options["pre_processor"] = cls.configure_pre_processor(config.data.size)
    with backbone_weights(CHECKPOINT):
        model: AnomalibModule = cls.load_from_checkpoint(checkpoint, map_location="cpu", **options)
    return model


def _options(cls: type[AnomalibModule], config: TrainConfig, weights: str) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters
    options = dict(config.model.options)
    section = config.model
    if section.layers is not None:
        options["layers"] = list(section.layers)
    if "backbone" in parameters:
        default = parameters["backbone"].default
        backbone = section.backbone or (default if isinstance(default, str) else None)
        if backbone is not None:
            # Classes that can be built without weights are filled afterwards; the others take them by timm's registry.
            aliased = weights != HUB and "pre_trained" not in parameters and backbone.partition(".")[0] in architectures()
            options["backbone"] = alias(backbone) if aliased else backbone
    elif section.backbone is not None:
        raise UsageError(f"{cls.__name__} has no backbone to choose", "leave model.backbone out")
    if weights == HUB and not options.get("pre_trained", True):
        raise UsageError(
            "model.options.pre_trained=false would train on random weights", "leave it out; --weights says what is taken"
        )
    if "pre_trained" in parameters and weights != HUB:
        options["pre_trained"] = False
    unknown = [name for name in options if name not in parameters]
    if unknown:
        error = unknown_name(f"option of {cls.__name__}", unknown[0], [name for name in parameters if name != "self"])
        raise error
    return options


def _backbones(model: AnomalibModule) -> list[Any]:
    """Return the timm backbones inside a model."""
    return [module for module in model.modules() if isinstance(module, (FeatureListNet, FeatureDictNet, FeatureHookNet))]


def _fill_extractors(model: AnomalibModule, weights: str) -> None:
    """Load the chosen weights into every timm backbone of a model that was built without any."""
    backbones = _backbones(model)
    architecture = model.hparams.get("backbone")
    if not backbones or not isinstance(architecture, str):
        raise UadxError(f"{type(model).__name__} takes its weights from timm's hub alone", "use --weights hub")
    for backbone in backbones:
        load_backbone(backbone, architecture, weights)


def _construct(cls: type[AnomalibModule], config: TrainConfig, weights: str) -> AnomalibModule:
    options = _options(cls, config, weights)
    parameters = inspect.signature(cls.__init__).parameters
    if "visualizer" in parameters:
        options["visualizer"] = False
    if "pre_processor" in parameters:
        options["pre_processor"] = cls.configure_pre_processor(config.data.size)
    if "evaluator" in parameters:
        # Held-out images are normal and without masks: metrics on them that need more are left out.
        options["evaluator"] = Evaluator(test_metrics=list(cls.configure_evaluator().test_metrics))
    fetches = weights == HUB and isinstance(options.get("backbone"), str) and timm.is_model(options["backbone"])
    if fetches:
        require_hub(options["backbone"])
    try:
        return cls(**options)
    except UadxError:
        raise
    except Exception as error:
        # Forty foreign constructors, each with its own ideas of what to raise.
        reason = reason_of(error)
        raise UadxError(
            f"anomalib's {cls.__name__} cannot be built: {reason}",
            f"check model.options and model.backbone; if the weights cannot be fetched: {WAYS_OUT}"
            if fetches
            else "check model.options and model.backbone; methods that fetch weights of their own need a network",
        ) from error
