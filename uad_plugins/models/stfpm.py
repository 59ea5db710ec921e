"""Student-Teacher Feature Pyramid Matching: anomalib's model, offline weights, a mean as loss, synthetic anomalies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.models import Stfpm as AnomalibStfpm
from anomalib.models.components import TimmFeatureExtractor
from anomalib.models.image.stfpm.loss import STFPMLoss
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn
from torch.nn import functional as F

from uad_plugins.config import OptimizerConfig
from uad_plugins.errors import UsageError
from uad_plugins.models.backbones import HUB, alias, backbone_weights, require_architecture
from uad_plugins.models.conditional import RecognisingTeacher, condition, plain
from uad_plugins.models.descriptors import anomaly_loss, distances, specialist_loss
from uad_plugins.models.options import ANOMALY_WEIGHT, FILLINGS, SOFT_EDGES, Filling
from uad_plugins.models.recipe import DistillationRecipe
from uad_plugins.models.specialists import Parts, Specialists

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


def student_network(architecture: str, teacher: Any) -> TimmFeatureExtractor:
    """Build a student of another architecture than its teacher's, untrained.

    Args:
        architecture: Name of a timm ResNet, plain or with attention.
        teacher: anomalib's ``TimmFeatureExtractor``.

    Raises:
        UsageError: timm has no such ResNet, weights are named with it, or its features have other shapes than the teacher's.
    """
    option = "model.options.student_backbone"
    if "." in architecture:
        raise UsageError(
            f"{option}: {architecture} names weights, and a student begins with none",
            f"use {architecture.partition('.')[0]}",
        )
    try:
        require_architecture(architecture)
    except UsageError as error:
        raise UsageError(f"{option}: {error.message}", error.hint) from None
    student = TimmFeatureExtractor(backbone=architecture, layers=teacher.layers, pre_trained=False, requires_grad=True)
    shapes = [list(zip(network.out_dims, network.reductions, strict=True)) for network in (student, teacher)]
    if shapes[0] != shapes[1]:
        mine, theirs = (", ".join(f"{channels} at 1/{stride}" for channels, stride in each) for each in shapes)
        raise UsageError(
            f"{option}: features of {architecture} are {mine}, those of the teacher {theirs}",
            "take a variant of the teacher's backbone (seresnet18 for resnet18), or leave it out",
        )
    return student


class Stfpm(DistillationRecipe, AnomalibStfpm):
    """STFPM for the unified setting.

    Differs from anomalib's class in what surrounds the network, not in the network: checkpoints of the two load into each
    other, but for those with a ``student_backbone`` or ``conditional_norm``.

    Args:
        backbone: Any timm ResNet.
        layers: Layers whose features are matched.
        weights: Teacher weights: ``hub``, ``bundled`` or a path.
        optimizer: See ``OptimizerConfig``; None is the published recipe (SGD 0.4).
        synthetic_anomalies: Share of the training images that get a synthetic anomaly, 0..1, on which the student has to
            keep its distance from the teacher. 0 is the published recipe.
        anomaly_fillings: What they are filled with; see ``SyntheticAnomalies``.
        anomaly_soft_edges: Share of them whose edges fade, 0..1.
        anomaly_weight: Weight of that part of the loss, with specialists too.
        specialists: Folder of runs of single products, one or several of each, from whose students this one learns, what to
            make of anomalies too.
        student_backbone: The student's, a timm ResNet whose features are shaped like the teacher's; None: the same.
        conditional_norm: Whether the student is to know which product it sees; see ``conditional``.
        products_apart: Whether each product of a batch is to be learnt as if it were alone; see ``DistillationRecipe``.
        categories: Names of the products that a checkpoint tells apart; not to be given otherwise.
        pre_processor: See anomalib.
        post_processor: See anomalib.
        evaluator: See anomalib.
        visualizer: See anomalib.

    Raises:
        UadxError: The weights are missing or of another architecture, or the specialists cannot teach this model.
        UsageError: A backbone does not exist, the student's does not fit, or there are specialists and no anomalies.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = LAYERS,
        weights: str = HUB,
        optimizer: Mapping[str, Any] | None = None,
        synthetic_anomalies: float = 0.0,
        anomaly_fillings: Sequence[Filling] = FILLINGS,
        anomaly_soft_edges: float = SOFT_EDGES,
        anomaly_weight: float = ANOMALY_WEIGHT,
        specialists: str | None = None,
        student_backbone: str | None = None,
        conditional_norm: bool = False,
        products_apart: bool = False,
        categories: Sequence[str] = (),
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
        if student_backbone is not None:
            self.model.student_model = student_network(student_backbone, self.model.teacher_model)
        self.weights_record = records[0] if records else None
        self.set_recipe(optimizer, RECIPE)
        self.model.backbone = backbone
        self.loss = MeanSTFPMLoss()
        self.anomaly_weight = anomaly_weight
        self.set_conditional(conditional_norm, products_apart, categories)
        self.model.to(memory_format=torch.channels_last)
        self.set_anomalies(synthetic_anomalies, anomaly_fillings, anomaly_soft_edges, specialists)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return the student's parameters."""
        parameters: Iterable[nn.Parameter] = self.model.student_model.parameters()
        return parameters

    @staticmethod
    def parts(network: Any) -> Parts:
        """Return teacher and student."""
        return plain(network.teacher_model), network.student_model

    def make_conditional(self, products: int) -> None:
        """See ``DistillationRecipe``."""
        teacher = self.model.teacher_model
        self.model.teacher_model = RecognisingTeacher(teacher, sum(teacher.out_dims), products)
        condition(self.model.student_model, self.model.teacher_model, own_statistics=self.products_apart)

    def loss_with_anomalies(self, images: torch.Tensor, drawn: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        """Keep the student apart from its teacher where anomalies are drawn; see ``DistillationRecipe``."""
        del images
        teacher, student = self.model(drawn)
        return anomaly_loss(teacher, student, opacity, self.anomaly_weight).mean()

    def loss_with_specialists(
        self, drawn: torch.Tensor, opacity: torch.Tensor, specialists: Specialists, categories: Sequence[str] | None
    ) -> torch.Tensor:
        """Bring the student to the specialists' mean descriptors; see ``DistillationRecipe``."""
        teacher, student = self.model(drawn)
        taught = specialists.teach(
            categories, drawn, lambda other, rows: [F.normalize(feature) for feature in other(drawn[rows]).values()]
        )
        specialist = dict(zip(student, taught, strict=True))
        return specialist_loss(teacher, specialist, student, opacity, self.anomaly_weight).mean()

    @staticmethod
    def distil(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each image and the anomaly maps; see ``DistillationRecipe``."""
        model: Any = network
        teacher, student = model.teacher_model(images), model.student_model(images)
        losses = [distance.mean(dim=(1, 2)) for distance in distances(teacher, student)]
        anomaly_map = model.anomaly_map_generator(
            teacher_features=teacher, student_features=student, image_size=images.shape[-2:]
        )
        return torch.stack(losses).sum(dim=0), anomaly_map
