"""The part of a model that is quantized: from a normalised image to its score and map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models import AnomalibModule
from torch import nn
from torchvision.transforms.v2 import Normalize

from uad_plugins.errors import UadxError
from uad_plugins.models.conditional import settle
from uad_plugins.models.recipe import DistillationRecipe


class Core(nn.Module):
    """A trained network that takes a normalised tensor and returns a plain tuple.

    In evaluation it returns the score and the map of each image, in training the loss and the map. A distillation method is
    called by ``DistillationRecipe.distil`` in both: NNCF knows an operation by the modules that were called around it, and
    quantizers placed in one way of calling are not met in another.

    Args:
        module: Trained anomalib module. Its network is used, not copied, and takes the form in which it is deployed.

    Attributes:
        observed: Called in place of everything else with the network and the images; None: nothing is.
    """

    def __init__(self, module: AnomalibModule) -> None:
        super().__init__()
        self.network: nn.Module = module.model
        settle(self.network)
        self.distil = type(module).distil if isinstance(module, DistillationRecipe) else None
        self.observed: Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]] | None = None

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Score a batch.

        Args:
            images: float32 ``(N, 3, H, W)``, normalised.

        Returns:
            Scores (in training: losses) float32 ``(N,)``, and anomaly maps float32 ``(N, H, W)``.

        Raises:
            UadxError: In training, of a method without ``distil``.
        """
        if self.observed is not None:
            return self.observed(self.network, images)
        if self.distil is not None:
            losses, anomaly_map = self.distil(self.network, images)
            anomaly_map = anomaly_map.flatten(0, 1)
            return losses if self.training else anomaly_map.amax(dim=(-2, -1)), anomaly_map
        if self.training:
            raise UadxError(
                "this method has no loss for each image", "quantization-aware training takes distillation methods"
            )
        output = self.network(images)
        anomaly_map = output.anomaly_map
        if anomaly_map.ndim == 4:
            anomaly_map = anomaly_map.flatten(0, 1)
        score = anomaly_map.amax(dim=(-2, -1)) if output.pred_score is None else output.pred_score.reshape(-1)
        return score, anomaly_map


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation of images in 0..1.

    Attributes:
        mean: Of each RGB channel.
        std: Of each RGB channel.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def preprocessing_of(module: AnomalibModule, size: tuple[int, int]) -> Preprocessing:
    """Return the normalisation that a model's pre-processor does to images that already have its size.

    Args:
        module: Trained module.
        size: ``(height, width)`` of its input.

    Raises:
        UadxError: The pre-processor does something else, which an exported model could not repeat.
    """
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    transform = getattr(module.pre_processor, "transform", None)
    for normalize in extract_transforms_by_type(transform, Normalize) if transform is not None else []:
        mean, std = tuple(map(float, normalize.mean)), tuple(map(float, normalize.std))
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    found = module.pre_processor(images) if module.pre_processor is not None else images
    expected = (images - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
        raise UadxError(
            f"the pre-processor of {type(module).__name__} does more than resize and normalise",
            "only models with anomalib's usual pre-processor can be quantized",
        )
    return Preprocessing((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def build_core(module: AnomalibModule, size: tuple[int, int]) -> Core:
    """Return the core of a trained module, on the CPU, in evaluation, in the usual memory layout.

    Args:
        module: Trained module.
        size: ``(height, width)`` of its input.

    Raises:
        UadxError: ``distil`` gives other maps or scores than the network itself, or the model needs to know the category.
    """
    if getattr(module, "by_category", False):
        raise UadxError(
            "the model's statistics are by category, which an exported graph of one image cannot know",
            "train it with model.options.statistics=global",
        )
    core = Core(module.cpu().eval()).to(memory_format=torch.contiguous_format).eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        score, anomaly_map = core(images)
        output = core.network(images)
    same = torch.allclose(anomaly_map.flatten(), output.anomaly_map.flatten(), rtol=1e-3, atol=1e-5)
    if output.pred_score is not None:
        same = same and torch.allclose(score, output.pred_score.reshape(-1), rtol=1e-3, atol=1e-5)
    if not same:
        raise UadxError(
            f"{type(module).__name__}: 'distil' and the network's own forward disagree", "they have to give the same map"
        )
    return core


def recalibrate(module: AnomalibModule, core: nn.Module, images: Iterable[torch.Tensor]) -> None:
    """Let a method measure anew what it keeps about its own output; see ``DistillationRecipe.recalibrate``.

    Args:
        module: Trained module that the core was built from.
        core: Quantized ``Core``; changed.
        images: Held-out images of good parts, float32 ``(1, 3, H, W)`` each, normalised.
    """
    if not isinstance(module, DistillationRecipe):
        return
    quantized: Any = core

    def observe(function: Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, ...]]:
        quantized.observed = function
        try:
            for image in images:
                yield quantized(image)
        finally:
            quantized.observed = None

    with torch.no_grad():
        module.recalibrate(quantized.network, observe)


def student_parameters(module: AnomalibModule) -> set[str]:
    """Return the names in ``Core`` of the parameters that training updates.

    Raises:
        UadxError: The method does not tell student and teacher apart.
    """
    if not isinstance(module, DistillationRecipe):
        raise UadxError(f"{type(module).__name__} has no student", "use scope 'all'")
    trained = {id(parameter) for parameter in module.trained_parameters()}
    return {f"network.{name}" for name, parameter in module.model.named_parameters() if id(parameter) in trained}
