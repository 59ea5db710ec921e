"""What the distillation models share: optimizer and schedule from the configuration, held-out loss, offline checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.post_processing import PostProcessor
from torch import nn, optim

from uad_plugins.config import OptimizerConfig
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models.augmentation import varies, vary
from uad_plugins.models.backbones import CHECKPOINT, WAYS_OUT, WeightsRecord
from uad_plugins.models.chances import ANOMALIES, chances_of
from uad_plugins.models.conditional import OPTION, RecognisingTeacher, groups_of, rows_of
from uad_plugins.models.descriptors import Groups
from uad_plugins.models.options import Filling
from uad_plugins.models.passes import batches
from uad_plugins.models.specialists import Parts, Specialists
from uad_plugins.models.synthetic_anomalies import SyntheticAnomalies

PASSES = 4
"""How often a training image is looked at, at most, to tell products apart: each time varied, and with anomalies, anew."""

ENOUGH = 3
"""So many images for each value that products are told apart by: of fewer, how these go together is not learnt."""

MOST = 1000
"""Looks at images of one product that say what it looks like, where no more are needed to have ``ENOUGH`` of all."""

Observe = Callable[[Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]]], Iterator[tuple[torch.Tensor, ...]]]
"""Calls a function with a network and batches of images, and yields what it returns."""


class WidePostProcessor(PostProcessor):
    """anomalib's post-processor with room above the threshold.

    anomalib scales scores by the range seen in validation and clips them to 0..1. Its validation split has defective images,
    ours has none: every defective image would be clipped to 1, and images clipped to the same value cannot be ranked. Here
    the range is wide enough for scores of 500 times the normal range; the threshold still lies at 0.5.
    """

    margin = 500.0

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take threshold and range from the validation images, then widen the range."""
        super().on_validation_epoch_end(trainer, pl_module)
        for low, high, threshold in (
            (self.image_min, self.image_max, self.image_threshold),
            (self.pixel_min, self.pixel_max, self.pixel_threshold),
        ):
            reach = (high - low) * self.margin
            low.copy_(threshold - reach)
            high.copy_(threshold + reach)


class DistillationRecipe:
    """Mixin for an ``AnomalibModule`` whose student learns to match a frozen teacher.

    Attributes:
        recipe: Optimizer and schedule.
        weights_record: Where the teacher's weights came from; None after loading a checkpoint.
        model: The network of teacher and student.
        held_out_loss: float32 ``(B,)``, the method's loss of each image of the last validation batch.
        anomalies: Draws synthetic anomalies into the training images; None where the method is trained as published.
        specialists: From which the student learns in place of its teacher; None where it learns from the teacher.
        conditional_norm: Whether the student is to know which product it sees; see ``conditional``.
        products_apart: Whether each product of a batch is learnt as if it were alone: normalised by mean and variance of its
            own (see ``ConditionalNorm``), its hard places mined among its own (see ``anomaly_loss``), its foreign pieces
            from its own images.
        products: Those that it tells apart; none before training, nor where there is one alone.
        restored: Whether its weights, the backbone's too, have come with a checkpoint.
    """

    recipe: OptimizerConfig
    weights_record: WeightsRecord | None
    model: Any
    held_out_loss: torch.Tensor | None
    anomalies: SyntheticAnomalies | None = None
    specialists: Specialists | None = None
    conditional_norm: bool = False
    products_apart: bool = False
    products: Sequence[str] = ()
    restored: bool = False

    @staticmethod
    def distil(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare student and teacher.

        All that is needed lies in the network, and the map is the one that its ``forward`` gives: this is what is quantized,
        trained on and deployed, called inside the ``forward`` of ``uad_plugins.quantization.core.Core``.

        Args:
            network: ``self.model``, or a quantized copy of it.
            images: float32 ``(B, 3, H, W)``, normalised.

        Returns:
            The method's loss of each image, float32 ``(B,)``, and the anomaly maps, float32 ``(B, 1, H, W)``.
        """
        raise NotImplementedError

    @staticmethod
    def recalibrate(network: nn.Module, observe: Observe) -> None:
        """Measure anew, through a quantized network, what the method keeps about its own output. Most keep nothing.

        Args:
            network: Quantized copy of ``self.model``; changed.
            observe: Calls a function with the network and each batch of held-out images of good parts, float32
                ``(B, 3, H, W)``, normalised, in the way in which quantizers act. The function begins as ``distil`` does.
        """

    def training_step(self, batch: Any, batch_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, whose products are told to a student that is to know them."""
        teacher = self.recogniser()
        if teacher is None:
            return self._training_step(batch, batch_idx, *args, **kwargs)
        products = self._products_of(batch)
        if self.products_apart:
            order = products.argsort(stable=True)
            batch, products = copy(batch), products[order]
            batch.image, batch.category = batch.image[order], [batch.category[row] for row in order.tolist()]
        with teacher.told(products):
            return self._training_step(batch, batch_idx, *args, **kwargs)

    def _training_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch: anomalib's step, or one with synthetic anomalies."""
        if self.anomalies is None:
            return super().training_step(batch, batch_idx, *args, **kwargs)  # type: ignore[misc]
        module: Any = self
        drawn, opacity = self.with_anomalies(batch.image, batch_idx, self.groups())
        if self.specialists is None:
            loss = self.loss_with_anomalies(batch.image, drawn, opacity)
        else:
            loss = self.loss_with_specialists(drawn, opacity, self.specialists, getattr(batch, "category", None))
        module.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(batch.image))
        return {"loss": loss}

    def loss_with_anomalies(self, images: torch.Tensor, drawn: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of images into which anomalies were drawn.

        Args:
            images: Good training images, float32 ``(B, 3, H, W)``, normalised.
            drawn: The same with anomalies.
            opacity: Of the anomalies; see ``SyntheticAnomalies.draw``.
        """
        raise NotImplementedError

    def loss_with_specialists(
        self, drawn: torch.Tensor, opacity: torch.Tensor, specialists: Specialists, categories: Sequence[str] | None
    ) -> torch.Tensor:
        """Return the scalar loss of images with anomalies, by what specialists make of them.

        Args:
            drawn: float32 ``(B, 3, H, W)``, normalised.
            opacity: Of the anomalies; see ``SyntheticAnomalies.draw``.
            specialists: Of the products.
            categories: Product of each image; None: not known, which they refuse.
        """
        raise NotImplementedError

    @staticmethod
    def parts(network: Any) -> Parts:
        """Return the teacher and the student of ``self.model``."""
        raise NotImplementedError

    def set_anomalies(self, share: float, fillings: Sequence[Filling], soft_edges: float, specialists: str | None) -> None:
        """Take what is drawn into training images, and who teaches what to make of it. Comes after the teacher's weights.

        Args:
            share: See ``SyntheticAnomalies``; 0 draws none.
            fillings: The same.
            soft_edges: The same.
            specialists: Folder of their runs, or None.

        Raises:
            UsageError: There are specialists, and no anomalies.
            UadxError: See ``Specialists.load``.
        """
        if share:
            self.anomalies = SyntheticAnomalies(share, fillings, soft_edges)
        if specialists is not None:
            if not share:
                raise UsageError(
                    "model.options.specialists teach on images with synthetic anomalies, and there are to be none",
                    "set model.options.synthetic_anomalies above 0, or take --config stfpm_unified",
                )
            # Without a record the weights come later, with a checkpoint.
            compare = self.weights_record is not None
            self.specialists = Specialists.load(Path(specialists), self, self.parts, compare=compare)

    def set_conditional(self, norm: bool, apart: bool, names: Sequence[str]) -> None:
        """Take whether the student knows its products, and of a checkpoint, which they are.

        Args:
            norm: See ``conditional_norm``.
            apart: See ``products_apart``.
            names: Of the products; none before training.

        Raises:
            UsageError: Products are to be learnt apart that nobody tells apart.
        """
        if apart and not norm:
            raise UsageError(
                "model.options.products_apart needs products that are told apart",
                "set model.options.conditional_norm=true, or leave it out",
            )
        self.conditional_norm, self.products_apart = norm, apart
        self.set_products(names)

    def set_products(self, names: Sequence[str]) -> None:
        """Have the student told which of these products it sees. Of a single one there is nothing to tell."""
        if len(names) > 1:
            self.products = list(names)
            self.make_conditional(len(names))

    def make_conditional(self, products: int) -> None:
        """Put a teacher that recognises so many products, and a student that is told, in place of those of ``model``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Learn the names of the products when training begins."""
        super().setup(stage)  # type: ignore[misc]
        if stage == "fit" and self.conditional_norm and not self.products:
            names = getattr(getattr(self.trainer, "datamodule", None), "trained_categories", [])  # type: ignore[attr-defined]
            if not names:
                raise UadxError(f"{OPTION} needs a datamodule that knows the products", "use UnifiedDataModule")
            self.set_products(names)

    def on_fit_start(self) -> None:
        """Learn to tell the products apart, from the training images; what a checkpoint has brought is kept.

        Raises:
            UadxError: The model was built for a checkpoint, and none was loaded: its backbone is random.
        """
        super().on_fit_start()  # type: ignore[misc]
        teacher, module = self.recogniser(), cast(Any, self)
        if module.hparams.get("weights") == CHECKPOINT and not self.restored:
            raise UadxError("weights='checkpoint' brings no backbone weights of its own", f"load one, or use {WAYS_OUT}")
        if teacher is None or (module.trainer.ckpt_path and teacher.has_learnt):
            return
        # Lightning sets the loaders up after this hook, unless a schedule has asked for the number of steps before.
        module.trainer.fit_loop.setup_data()
        teacher.learn(self._shown(ENOUGH * teacher.classifier.in_channels))

    def _shown(self, enough: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the training images as the network is shown them, varied and with anomalies, and their products.

        Once, and again until there are enough of them in all processes, where they are not the same each time. Batches of
        products that have been seen often enough are passed by: memory does not grow with the number of images.
        """
        module: Any = self
        most = max(MOST, math.ceil(enough / len(self.products)))
        trainer, numbers, seen = module.trainer, count(), torch.zeros(len(self.products), dtype=torch.long)
        for _ in range(PASSES if self.anomalies is not None or varies(trainer) else 1):
            for batch, number in zip(batches(trainer.train_dataloader), numbers, strict=False):
                rows = rows_of(getattr(batch, "category", None), self.products)
                if (seen[rows] * trainer.world_size >= most).all():
                    continue
                seen += rows.bincount(minlength=len(seen))
                batch.image = batch.image.to(module.device)
                vary(trainer, module, batch, number)
                images = batch.image
                images = images if module.pre_processor is None else module.pre_processor(images)
                products = rows.to(module.device)
                groups = groups_of(products) if self.products_apart else None
                yield images if self.anomalies is None else self.with_anomalies(images, number, groups)[0], products
            if seen.sum() * trainer.world_size >= enough:
                break

    def _products_of(self, batch: Any) -> torch.Tensor:
        return rows_of(getattr(batch, "category", None), self.products).to(batch.image.device)

    def recogniser(self) -> RecognisingTeacher | None:
        """Return the teacher that tells products apart; None: they are not."""
        return next((each for each in self.model.modules() if isinstance(each, RecognisingTeacher)), None)

    def groups(self) -> Groups | None:
        """Return which product each image of the batch shows that is trained on, where products are learnt apart."""
        teacher = self.recogniser() if self.products_apart else None
        return None if teacher is None else teacher.recognised.groups

    def require_categories(self, categories: Iterable[str]) -> None:
        """Check, before training, that these products can be learnt.

        Raises:
            UadxError: One has no specialist.
        """
        if self.specialists is not None:
            self.specialists.require(categories)

    def run_record(self) -> dict[str, Any]:
        """Return what the run notes of the training: the SHA-256 of the checkpoints of the specialists, by product."""
        return {"specialists": self.specialists.origins} if self.specialists is not None else {}

    def with_anomalies(
        self, images: torch.Tensor, batch_idx: int = 0, groups: Groups | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw synthetic anomalies into training images, normalised as they are; see ``SyntheticAnomalies.draw``.

        Which, the chances of the batch say; see ``chances``.
        """
        assert self.anomalies is not None
        transform = getattr(getattr(self, "pre_processor", None), "transform", None)
        chances = chances_of(self, batch_idx, ANOMALIES)
        return self.anomalies.draw(images, transform or nn.Identity(), chances, groups)

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict, and note the loss of each image in ``held_out_loss``."""
        del args, kwargs
        self.held_out_loss, anomaly_map = self.distil(self.model, batch.image)
        teacher, names = self.recogniser(), getattr(batch, "category", None)
        if teacher is not None and teacher.recognised.products is not None and names:
            found = [self.products[row] for row in teacher.recognised.products.flatten(1).argmax(dim=1).tolist()]
            share = sum(mine == name for mine, name in zip(found, names, strict=True)) / len(names)
            module: Any = self
            module.log("val_recognised", share, on_epoch=True, sync_dist=True, batch_size=len(names))
        return batch.update(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)

    def configure_post_processor(self) -> PostProcessor:
        """Return the post-processor that anomalib's own testing uses."""
        return WidePostProcessor()

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        raise NotImplementedError

    def set_recipe(self, optimizer: Mapping[str, Any] | OptimizerConfig | None, default: OptimizerConfig) -> None:
        """Take the optimizer settings given, or the method's own."""
        if optimizer is None:
            self.recipe = default
        else:
            self.recipe = OptimizerConfig.model_validate(
                optimizer if isinstance(optimizer, OptimizerConfig) else dict(optimizer)
            )
        self.held_out_loss = None

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with a schedule over all steps when the recipe has one."""
        recipe, parameters = self.recipe, [p for p in self.trained_parameters() if p.requires_grad]
        optimizer: optim.Optimizer
        if recipe.name == "sgd":
            optimizer = optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        else:
            kind = optim.Adam if recipe.name == "adam" else optim.AdamW
            optimizer = kind(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
        if recipe.schedule == "constant" and recipe.warmup == 0:
            return optimizer
        steps = max(1, int(self.trainer.estimated_stepping_batches))  # type: ignore[attr-defined]
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and remember that they have come; see ``torch.nn.Module``."""
        loaded = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.restored = True
        return loaded

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network of a checkpoint that tells products apart, where this one does not yet."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self.conditional_norm and not self.products:
            self.set_products(checkpoint["hyper_parameters"].get("categories") or ())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note in the checkpoint that it brings the teacher's weights and needs no specialists: loading fetches nothing."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint["hyper_parameters"]["weights"] = CHECKPOINT
        if self.specialists is not None:
            checkpoint["hyper_parameters"]["specialists"] = None
        if self.products:
            checkpoint["hyper_parameters"]["categories"] = list(self.products)


def learning_rate_factor(recipe: OptimizerConfig, progress: float) -> float:
    """Return the learning rate as a share of its highest.

    Args:
        recipe: Schedule and warm-up.
        progress: Share of all steps done, 0..1.
    """
    rise = min(1.0, (progress + 1e-3) / recipe.warmup) if recipe.warmup > 0 else 1.0
    return rise * (0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if recipe.schedule == "cosine" else 1.0)
