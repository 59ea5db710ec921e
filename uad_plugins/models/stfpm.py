"""Student-Teacher Feature Pyramid Matching: anomalib's model with offline weights and a loss that is a mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.models import Stfpm as AnomalibStfpm
from anomalib.models.image.stfpm.loss import STFPMLoss
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn
from torch.nn import functional as F

from uad_plugins.config import OptimizerConfig
from uad_plugins.models.backbones import HUB, alias, backbone_weights, require_architecture
from uad_plugins.models.recipe import DistillationRecipe

LAYERS = ("layer1", "layer2", "layer3")
RECIPE = OptimizerConfig(name="sgd", lr=0.4, momentum=0.9, weight_decay=1e-4)


class MeanSTFPMLoss(STFPMLoss):
    """The loss of the method's authors: squared distance of unit descriptors, averaged over pixels *and images*.

    anomalib's sums over the batch and halves, so that its step grows with the batch size; this one is ``2 / B`` times it,
    and a learning rate means the same at every batch size (arXiv 2103.04257, equations 1 to 3).
    """

    def forward(self, teacher_features: dict[str, torch.Tensor], student_features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the scalar loss of features ``(B, C, H, W)`` by layer."""
        batch = next(iter(teacher_features.values())).shape[0]
        loss: torch.Tensor = super().forward(teacher_features, student_features)
        return loss * (2 / batch)


class Stfpm(DistillationRecipe, AnomalibStfpm):
    """STFPM for the unified setting.

    Differs from anomalib's class in what surrounds the network, not in the network: checkpoints of the two load into each
    other.

    Args:
        backbone: Any timm ResNet.
        layers: Layers whose features are matched.
        weights: Teacher weights: ``hub``, ``bundled`` or a path.
        optimizer: See ``OptimizerConfig``; None is the published recipe (SGD 0.4).
        pre_processor: See anomalib.
        post_processor: See anomalib.
        evaluator: See anomalib.
        visualizer: See anomalib.

    Raises:
        UadxError: The weights are missing or of another architecture.
        UsageError: The backbone does not exist.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = LAYERS,
        weights: str = HUB,
        optimizer: Mapping[str, Any] | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        require_architecture(backbone)
        with backbone_weights(weights) as records:
            super().__init__(
                backbone=alias(backbone),
                layers=list(layers),
                pre_processor=pre_processor,
                post_processor=post_processor,
                evaluator=evaluator,
                visualizer=visualizer,
            )
        self.weights_record = records[0] if records else None
        self.set_recipe(optimizer, RECIPE)
        self.model.backbone = backbone
        self.model.to(memory_format=torch.channels_last)
        self.loss = MeanSTFPMLoss()

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return the student's parameters."""
        parameters: Iterable[nn.Parameter] = self.model.student_model.parameters()
        return parameters

    @staticmethod
    def distil(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each image and the anomaly maps; see ``DistillationRecipe``."""
        model: Any = network
        teacher, student = model.teacher_model(images), model.student_model(images)
        losses = [
            (F.normalize(teacher[layer]) - F.normalize(student[layer])).square().sum(dim=1).mean(dim=(1, 2))
            for layer in teacher
        ]
        anomaly_map = model.anomaly_map_generator(
            teacher_features=teacher, student_features=student, image_size=images.shape[-2:]
        )
        return torch.stack(losses).sum(dim=0), anomaly_map
