"""Reverse Distillation: anomalib's model with offline weights, the published optimizer, and maps at the input's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.models import ReverseDistillation as AnomalibReverseDistillation
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn
from torch.nn import functional as F

from uad_plugins.config import OptimizerConfig
from uad_plugins.errors import UsageError
from uad_plugins.models.backbones import CHECKPOINT, HUB, load_backbone, require_architecture
from uad_plugins.models.chances import DROPOUT, chances_of
from uad_plugins.models.conditional import RecognisingTeacher, condition, plain
from uad_plugins.models.descriptors import EASY, Groups, anomaly_loss, distances, specialist_loss, well_learnt
from uad_plugins.models.options import FILLINGS, SOFT_EDGES, Filling
from uad_plugins.models.recipe import DistillationRecipe
from uad_plugins.models.specialists import Parts, Specialists

LAYERS = ("layer1", "layer2", "layer3")
RECIPE = OptimizerConfig(name="adam", lr=5e-3, betas=(0.5, 0.999), weight_decay=1e-5)
BACKBONES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
"""Backbones for which the method has a mirrored decoder."""


class AnyLayoutLoss(ReverseDistillationLoss):
    """anomalib's loss, for features in channels-last memory as well; well restored places may count less in its gradient.

    What is restored well already need not be restored better, or bad places will be restored too: the rest is learnt (the
    loose loss of arXiv 2405.14325, section 3.4).

    Args:
        mining: Share of the places of a layer in the batch, those restored best, whose gradient counts ``EASY`` of the
            others', 0..1 exclusive. 0 is the published loss.
        groups: Gives the rows of the batch by product, each of which is mined by itself; None: all of them together.
    """

    def __init__(self, mining: float = 0.0, groups: Callable[[], Groups | None] = lambda: None) -> None:
        super().__init__()
        self.mining, self.groups = mining, groups

    def forward(self, encoder_features: list[torch.Tensor], decoder_features: list[torch.Tensor]) -> torch.Tensor:
        """Return the scalar loss of two lists of features ``(B, C, H, W)``."""
        if self.mining:
            pairs, groups = zip(encoder_features, decoder_features, strict=True), self.groups()
            decoder_features = [_held_back(before, after, self.mining, groups) for before, after in pairs]
        loss: torch.Tensor = ReverseDistillationLoss.forward(
            [feature.contiguous() for feature in encoder_features],
            [feature.contiguous() for feature in decoder_features],
        )
        return loss


def _held_back(before: torch.Tensor, after: torch.Tensor, share: float, groups: Groups | None) -> torch.Tensor:
    """Return the decoder's features as they are, with a smaller gradient where they are nearest to the encoder's."""
    apart = 1 - F.cosine_similarity(before.float(), after.detach().float())
    easy = torch.empty_like(apart, dtype=torch.bool)
    for rows in groups.values() if groups is not None else [slice(None)]:
        easy[rows] = well_learnt(apart[rows], share)
    return torch.where(easy[:, None], after.detach() + EASY * (after - after.detach()), after)


def _by_layer(features: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(LAYERS, features, strict=True))


class ReverseDistillation(DistillationRecipe, AnomalibReverseDistillation):
    """Reverse Distillation for the unified setting.

    Checkpoints load into anomalib's class and back, but for those with ``conditional_norm``.

    Args:
        backbone: One of ``BACKBONES``.
        layers: The three layers whose features are restored; the bottleneck takes exactly these.
        anomaly_map_mode: ``add`` or ``multiply`` the maps of the layers.
        weights: Encoder weights: ``hub``, ``bundled`` or a path.
        optimizer: See ``OptimizerConfig``; None is the published recipe (Adam 5e-3).
        synthetic_anomalies: Share of the training images in which the decoder gets a synthetic anomaly, 0..1, and has to
            restore the features of the good part, or must not restore it. 0 is the published recipe.
        anomaly_fillings: What they are filled with; see ``SyntheticAnomalies``.
        anomaly_soft_edges: Share of them whose edges fade, 0..1.
        specialists: Folder of runs of single products, one or several of each, from whose decoders this one learns, what to
            make of anomalies too.
        conditional_norm: Whether bottleneck and decoder are to know which product they see; see ``conditional``.
        products_apart: Whether each product of a batch is to be learnt as if it were alone; see ``DistillationRecipe``.
        anomaly_weight: Weight of the distance that the decoder has to keep from the encoder on synthetic anomalies; all else
            is then learnt place by place; see ``anomaly_loss``. None: it has to restore the good part there.
        bottleneck_dropout: Share of the bottleneck's values, drawn for each batch, that the decoder has to do without while
            training (arXiv 2405.14325, section 3.2), 0..1 exclusive. 0 is the published recipe.
        hard_mining: See ``AnyLayoutLoss``, or ``anomaly_loss`` with an ``anomaly_weight``; 0 learns from all places alike.
        categories: Names of the products that a checkpoint tells apart; not to be given otherwise.
        pre_processor: See anomalib.
        post_processor: See anomalib.
        evaluator: See anomalib.
        visualizer: See anomalib.
        pre_trained: For anomalib, which fetches weights when it is true; the encoder's come from ``weights``.

    Raises:
        UadxError: The weights are missing or of another architecture, or the specialists cannot teach this model.
        UsageError: The backbone has no decoder, the layers are others than the method's, or there are no anomalies, but
            specialists or a weight of them.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = LAYERS,
        anomaly_map_mode: AnomalyMapGenerationMode = AnomalyMapGenerationMode.ADD,
        weights: str = HUB,
        optimizer: Mapping[str, Any] | None = None,
        synthetic_anomalies: float = 0.0,
        anomaly_fillings: Sequence[Filling] = FILLINGS,
        anomaly_soft_edges: float = SOFT_EDGES,
        specialists: str | None = None,
        conditional_norm: bool = False,
        products_apart: bool = False,
        anomaly_weight: float | None = None,
        bottleneck_dropout: float = 0.0,
        hard_mining: float = 0.0,
        categories: Sequence[str] = (),
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        pre_trained: bool = False,
    ) -> None:
        architecture = require_architecture(backbone, BACKBONES)
        if tuple(layers) != LAYERS:
            raise UsageError(f"Reverse Distillation takes the layers {', '.join(LAYERS)}", "its bottleneck fits no others")
        if anomaly_weight is not None and not synthetic_anomalies:
            raise UsageError(
                "model.options.anomaly_weight needs synthetic anomalies, and there are to be none",
                "set model.options.synthetic_anomalies above 0, or model.options.anomaly_weight=null",
            )
        super().__init__(
            backbone=architecture,
            layers=list(layers),
            anomaly_map_mode=AnomalyMapGenerationMode(anomaly_map_mode),
            pre_trained=False,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.weights_record = None
        if weights != CHECKPOINT:
            self.weights_record = load_backbone(self.model.encoder.feature_extractor, backbone, weights)
        self.set_recipe(optimizer, RECIPE)
        self.loss = AnyLayoutLoss(hard_mining, self.groups)
        self.anomaly_weight, self.hard_mining = anomaly_weight, hard_mining
        self.model.by_places = anomaly_weight is not None
        self.bottleneck_dropout = bottleneck_dropout
        self._close()
        self.set_conditional(conditional_norm, products_apart, categories)
        self.model.to(memory_format=torch.channels_last)
        self.set_anomalies(synthetic_anomalies, anomaly_fillings, anomaly_soft_edges, specialists)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of bottleneck and decoder."""
        return chain(self.model.decoder.parameters(), self.model.bottleneck.parameters())

    @staticmethod
    def parts(network: Any) -> Parts:
        """Return the encoder, and bottleneck and decoder as one."""
        return plain(network.encoder), nn.Sequential(network.bottleneck, network.decoder)

    def make_conditional(self, products: int) -> None:
        """See ``DistillationRecipe``."""
        encoder = self.model.encoder
        self.model.encoder = RecognisingTeacher(encoder, sum(encoder.out_dims), products)
        for student in self.model.bottleneck, self.model.decoder:
            condition(student, self.model.encoder, own_statistics=self.products_apart)
        self._close()

    def _close(self) -> None:
        """Close what takes no part in the loss and anomalib leaves open: processes that train together would wait for it."""
        for part in self.model.encoder, self.model.bottleneck.conv4, self.model.bottleneck.bn4:
            part.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, through a noisy bottleneck where there is to be one."""
        if not self.bottleneck_dropout:
            return super().training_step(batch, batch_idx, *args, **kwargs)
        # Two million values of a batch: on their own device.
        kept, chances = 1 - self.bottleneck_dropout, chances_of(self, batch_idx, DROPOUT, batch.image.device)

        def drop(_module: nn.Module, _inputs: Any, features: torch.Tensor) -> torch.Tensor:
            mask = torch.empty(features.shape, dtype=torch.bool, device=features.device).bernoulli_(kept, generator=chances)
            return features * mask / kept

        # Only here: held-out images, exports and quantization-aware training see the bottleneck as it is.
        hook = self.model.bottleneck.register_forward_hook(drop)
        try:
            return super().training_step(batch, batch_idx, *args, **kwargs)
        finally:
            hook.remove()

    def loss_with_specialists(
        self, drawn: torch.Tensor, opacity: torch.Tensor, specialists: Specialists, categories: Sequence[str] | None
    ) -> torch.Tensor:
        """Bring the decoder's features to those of the specialists; see ``DistillationRecipe``."""
        encoded, decoded = self.model(drawn)
        whole: Any = (1, 2, 3) if self.anomaly_weight is None else 1
        taught = specialists.teach(
            categories,
            drawn,
            lambda other, rows: [F.normalize(each, dim=whole) for each in other([part[rows] for part in encoded])],
        )
        if self.anomaly_weight is not None:
            before, goal, after = map(_by_layer, (encoded, taught, decoded))
            weight, mining, groups = self.anomaly_weight, self.hard_mining, self.groups()
            return specialist_loss(before, goal, after, opacity, weight, mining, groups).mean()
        loss: torch.Tensor = self.loss(taught, decoded)
        return loss

    def loss_with_anomalies(self, images: torch.Tensor, drawn: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        """Have the decoder restore the good part where anomalies are drawn, or no part; see ``DistillationRecipe``."""
        encoded, decoded = self.model(drawn)
        if self.anomaly_weight is not None:
            before, after, groups = _by_layer(encoded), _by_layer(decoded), self.groups()
            return anomaly_loss(before, after, opacity, self.anomaly_weight, self.hard_mining, groups).mean()
        chosen = opacity.amax(dim=(1, 2, 3)) > 0
        if chosen.any():
            good = plain(self.model.encoder)(images[chosen]).values()
            encoded = [feature.index_put((chosen,), part) for feature, part in zip(encoded, good, strict=True)]
        loss: torch.Tensor = self.loss(encoded, decoded)
        return loss

    @staticmethod
    def distil(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each image and the anomaly maps; see ``DistillationRecipe``."""
        model: Any = network
        model.encoder.eval()
        encoded = list(model.encoder(images).values())
        decoded = model.decoder(model.bottleneck(encoded))
        if model.by_places:
            losses = [each.mean(dim=(1, 2)) for each in distances(_by_layer(encoded), _by_layer(decoded))]
        else:
            losses = [
                1 - F.cosine_similarity(before.flatten(1), after.flatten(1))
                for before, after in zip(encoded, decoded, strict=True)
            ]
        return torch.stack(losses).sum(dim=0), model.anomaly_map_generator(encoded, decoded)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note that anomalib's own class need not fetch weights either."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["pre_trained"] = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the input size: the map generator was built before the pre-processor's size was known."""
        super().on_load_checkpoint(checkpoint)
        if self.input_size is not None:
            self.model.anomaly_map_generator.image_size = tuple(self.input_size)
