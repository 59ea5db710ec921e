"""Uninformed Students as an anomalib model: teachers, statistics and training around the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from uad_plugins.config import OptimizerConfig
from uad_plugins.errors import UadxError
from uad_plugins.models.backbones import BUNDLED, BUNDLED_ARCHITECTURE, CHECKPOINT, HUB, require_architecture
from uad_plugins.models.passes import batches, flattened
from uad_plugins.models.recipe import DistillationRecipe, Observe
from uad_plugins.models.uninformed_students.grids import grid_of_step
from uad_plugins.models.uninformed_students.networks import DIMENSIONS, PatchNetwork, patch_networks
from uad_plugins.models.uninformed_students.options import BY_CATEGORY, GLOBAL, UninformedStudentsOptions
from uad_plugins.models.uninformed_students.teachers import (
    PretrainedFeature,
    TeacherRecord,
    bundled_teacher,
    distilled_teachers,
    patch_source,
    records_as_dict,
    shipped_recipes,
)
from uad_plugins.models.uninformed_students.torch_model import Moments, UninformedStudentsModel

RECIPE = OptimizerConfig(name="adam", lr=1e-4, weight_decay=1e-5)


class UninformedStudents(DistillationRecipe, AnomalibModule):
    """Uninformed Students (Bergmann et al., CVPR 2020, arXiv 1911.02357).

    The teachers are taken from the package (``weights="bundled"``, where one ships for the patch size and width and
    ``teacher`` is as in a configuration that ships), from the cache, or are distilled when training begins. The statistics
    of their descriptors are taken from the training images before the first step, each image once whatever the sampling, of
    the pixels that the output stride gives: with a stride of 4 every sixteenth. Those of error and variance are taken from
    the held-out images before each validation (without any, from the training images after each epoch), so that the
    checkpoints written then hold the ones of their weights.

    Args:
        backbone: timm ResNet that the teachers are distilled from.
        weights: Its weights: ``hub``, ``bundled`` or a path.
        patch_sizes: Scales, of 17, 33, 65.
        students: Students in each ensemble (M).
        width: Channels of the hidden layers as a share of the paper's.
        stride: Output stride of the dense evaluation: 1, 2, 4 or 8.
        train_stride: Output stride while training; the offset changes with each batch, so that every
            pixel is trained on. None: ``stride``.
        train_window: Side of the square of pixels that a batch is trained on, another one for each. None: the whole image.
        statistics: ``global``, or ``category`` for statistics of each category.
        teacher: How teachers are distilled; see ``TeacherRecipe``.
        categories: Names of the categories whose statistics a checkpoint holds; not to be given otherwise.
        optimizer: See ``OptimizerConfig``; None is the published recipe (Adam 1e-4).
        pre_processor: See anomalib.
        post_processor: See anomalib.
        evaluator: See anomalib.
        visualizer: See anomalib.

    Raises:
        UadxError: The weights are missing or of another architecture.
        UsageError: The backbone does not exist.
        pydantic.ValidationError: An option has no such value.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        weights: str = HUB,
        patch_sizes: Sequence[int] = (17, 33, 65),
        students: int = 3,
        width: float = 1.0,
        stride: int = 1,
        train_stride: int | None = None,
        train_window: int | None = None,
        statistics: str = GLOBAL,
        teacher: Mapping[str, Any] | None = None,
        categories: Sequence[str] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        options = UninformedStudentsOptions.model_validate(
            {
                "patch_sizes": list(patch_sizes),
                "students": students,
                "width": width,
                "stride": stride,
                "train_stride": train_stride,
                "train_window": train_window,
                "statistics": statistics,
                "teacher": dict(teacher or {}),
            }
        )
        bare = require_architecture(backbone)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.patch_sizes, self.width = list(patch_sizes), width
        self.train_stride, self.train_window = train_stride or stride, train_window
        self.statistics = statistics
        self.categories = list(categories or [])
        self.teacher_recipe = options.teacher
        self.teacher_records: list[dict[str, Any]] = []
        self.weights_record = None
        self.model = UninformedStudentsModel(patch_sizes, students, width, stride, len(self.categories))
        self.model.to(memory_format=torch.channels_last)
        self.set_recipe(optimizer, RECIPE)
        # In a list, so that it is no part of the module and of no checkpoint.
        self._pretrained: list[PretrainedFeature] = []
        self._missing = [] if weights == CHECKPOINT else list(range(len(patch_sizes)))
        if weights == BUNDLED and bare == BUNDLED_ARCHITECTURE and options.teacher in shipped_recipes():
            self._missing = [scale for scale in self._missing if not self._take_bundled(scale)]
        if self._missing:
            # Loaded now: missing weights are found before any image is read.
            recipe = self.teacher_recipe
            self._pretrained.append(PretrainedFeature(backbone, weights, recipe.layer, recipe.target_size))
            self.weights_record = self._pretrained[0].record

    model: UninformedStudentsModel

    @property
    def learning_type(self) -> LearningType:
        """It learns from normal images alone."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing that the trainer would have to be told."""
        return {}

    @property
    def by_category(self) -> bool:
        """Whether predicting takes the category of each image."""
        return self.statistics == BY_CATEGORY

    def run_record(self) -> dict[str, Any]:
        """Return what the manifest of a run says of this method: where its teachers came from."""
        return {"teachers": self.teacher_records}

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return the students' parameters."""
        return self.model.students.parameters()

    # Teachers

    def setup(self, stage: str) -> None:
        """Learn the names of the categories, when training begins."""
        super().setup(stage)
        if stage == "fit" and self.by_category:
            names = list(getattr(getattr(self.trainer, "datamodule", None), "categories", []))
            if names != self.categories or not names:
                self._set_categories(names)

    def _set_categories(self, names: list[str]) -> None:
        if not names:
            raise UadxError(
                "statistics by category need a datamodule that knows the categories",
                "use uad_plugins.data.UnifiedDataModule, or statistics=global",
            )
        self.categories = names
        fresh = UninformedStudentsModel(self.patch_sizes, 1, 1 / 16, 1, len(names))
        for name in ("feature_mean", "feature_std", "score_mean", "score_std"):
            setattr(self.model, name, getattr(fresh, name).to(self.device))
        self.model.by_category = True

    def _take_bundled(self, scale: int) -> bool:
        found = bundled_teacher(self.patch_sizes[scale], self.width)
        if found is None:
            return False
        self._take(scale, *found)
        return True

    def _take(self, scale: int, network: PatchNetwork, record: TeacherRecord) -> None:
        patch_networks(self.model.teachers)[scale].take(network)
        self.teacher_records += records_as_dict([record])

    def _distil(self) -> None:
        # On every process: setting loaders up is a meeting of all.
        loaders = flattened(self._training_loaders())
        data = getattr(loaders[0], "dataset", None) if loaders else None
        size = tuple(self.input_size or (256, 256))
        found = distilled_teachers(
            self.trainer.strategy,
            self.teacher_recipe,
            [self.patch_sizes[scale] for scale in self._missing],
            self.width,
            self._pretrained[0],
            lambda: patch_source(self.teacher_recipe.images, data, size),
        )
        for scale, (network, record) in zip(self._missing, found, strict=True):
            self._take(scale, network, record)
        self._missing, self._pretrained = [], []

    # Statistics

    def on_fit_start(self) -> None:
        """Get the teachers, and mean and deviation of their descriptors over the training images.

        A checkpoint that training goes on from has been read by now: what it brought is kept. Another training of the same
        model takes them anew, of its own images.
        """
        super().on_fit_start()
        largest = max(self.patch_sizes)
        if self.input_size is not None and min(self.input_size) < largest:
            raise UadxError(
                f"patches of {largest}x{largest} pixels are larger than images of {min(self.input_size)}",
                "use larger images, or smaller patch_sizes",
            )
        if self._missing:
            self._distil()
        if not self.model.normalised or self.trainer.ckpt_path is None:
            self._set_feature_statistics()

    def _training_loaders(self) -> Any:
        # Lightning sets them up after this hook, unless a schedule has asked for the number of steps before.
        self.trainer.fit_loop.setup_data()
        return self.trainer.train_dataloader

    def _set_feature_statistics(self) -> None:
        """Take the statistics of the descriptors that are evaluated: at the output stride, of each training image once."""
        moments = [self._moments(DIMENSIONS) for _ in self.patch_sizes]
        for images, rows, _ in self._images(batches(self._training_loaders())):
            for moment, target in zip(moments, self.model.targets(images), strict=True):
                for row, descriptors in zip(rows, target[:, 0], strict=True):
                    moment.add(row, descriptors.flatten(1).T)
        found = [self._reduced(moment) for moment in moments]
        if found[0].empty:
            raise UadxError("there is no training image", "the teachers' descriptors are normalised over those")
        for scale, moment in enumerate(found):
            self.model.feature_mean[scale], self.model.feature_std[scale] = moment.result()

    def on_validation_epoch_start(self) -> None:
        """Take mean and deviation of error and variance over the held-out normal pixels, while training.

        Before the validation and not within it: the maps and scores that others see there, such as the post-processor for
        its thresholds, are those of these statistics.
        """
        super().on_validation_epoch_start()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            held_out = batches(self.trainer.val_dataloaders, self.trainer.num_val_batches)
            if not self._set_score_statistics(held_out):
                self._score_training_images()

    def on_train_epoch_end(self) -> None:
        """Take them over the training images where nothing is held out."""
        super().on_train_epoch_end()
        held_out = self.trainer.num_val_batches
        if not self.trainer.enable_validation or (held_out and not sum(held_out)):
            self._score_training_images()

    def _score_training_images(self) -> None:
        rank_zero_warn(
            "no normal image is held out: mean and deviation of error and variance come from the training images, where "
            "both are smaller than on new ones"
        )
        self._set_score_statistics(batches(self._training_loaders()))

    def _set_score_statistics(self, found_in: Iterable[Any]) -> bool:
        """Set them from the normal images in batches; False, and nothing set, where there is none."""
        moments = [self._moments(2) for _ in self.patch_sizes]
        for images, rows, normal in self._images(found_in):
            found = self.model.deviations(images, self._category(rows))
            values = torch.stack([found.errors, found.variances], dim=-1)
            for row, good, of_image in zip(rows, normal, values, strict=True):
                for moment, of_scale in zip(moments, of_image, strict=True):
                    if good:
                        moment.add(row, of_scale.flatten(0, 1))
        reduced = [self._reduced(moment) for moment in moments]
        if reduced[0].empty:
            return False
        for scale, moment in enumerate(reduced):
            self.model.score_mean[scale], self.model.score_std[scale] = moment.result()
        return True

    @staticmethod
    def recalibrate(network: Any, observe: Observe) -> None:
        """Take mean and deviation of error and variance again: quantizers shift both; see ``DistillationRecipe``."""

        def deviations(network: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = network.deviations(images)
            return found.errors, found.variances

        moments = [Moments((1, 2), network.score_mean.device) for _ in network.score_mean]
        for values in observe(deviations):
            for moment, of_scale in zip(moments, torch.stack(values, dim=-1).unbind(1), strict=True):
                moment.add(0, of_scale.flatten(0, -2))
        for scale, moment in enumerate(moments):
            network.score_mean[scale], network.score_std[scale] = moment.result()

    def _moments(self, length: int) -> Moments:
        return Moments((max(1, len(self.categories)), length), self.device)

    def _reduced(self, moments: Moments) -> Moments:
        moments.sums = self.trainer.strategy.reduce(moments.sums, reduce_op="sum")
        return moments

    def _images(self, found_in: Iterable[Any]) -> Iterator[tuple[torch.Tensor, list[int], list[bool]]]:
        """Yield normalised images on the module's device, the row of each in the statistics, and whether it is normal."""
        training = self.training
        self.eval()
        with torch.no_grad():
            for batch in found_in:
                images = batch.image.to(self.device)
                if self.pre_processor is not None:
                    images = self.pre_processor(images)
                images = torch.as_tensor(images).as_subclass(torch.Tensor)
                category = self._category_of(batch)
                rows = [0] * len(images) if category is None else category.tolist()
                labels = batch.gt_label
                yield images, rows, [not label for label in labels.tolist()] if labels is not None else [True] * len(images)
        self.train(training)

    def _category(self, rows: Sequence[int]) -> torch.Tensor | None:
        return torch.tensor(rows, device=self.device) if self.by_category else None

    def _category_of(self, batch: Any) -> torch.Tensor | None:
        if not self.by_category:
            return None
        if getattr(batch, "category_index", None) is None:
            raise UadxError(
                "statistics by category, and images whose category is not known",
                "use uad_plugins.data.UnifiedDataModule, or statistics=global",
            )
        return torch.as_tensor(batch.category_index)

    # Steps

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return the loss of a batch."""
        del args, kwargs
        images = batch.image
        size = (int(images.shape[-2]), int(images.shape[-1]))
        grid = grid_of_step(self.global_step, size, self.train_stride, self.train_window)
        loss = self.model.losses(images, self._category_of(batch), grid).mean()
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(images))
        return {"loss": loss}

    @staticmethod
    def distil(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each image and the anomaly maps, with global statistics; see ``DistillationRecipe``."""
        return loss_and_map(network, images, None)

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict, and note the loss of each image in ``held_out_loss``."""
        del args, kwargs
        self.held_out_loss, anomaly_map = loss_and_map(self.model, batch.image, self._category_of(batch))
        return batch.update(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)

    def test_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict."""
        del args, kwargs
        found = self.model(batch.image, self._category_of(batch))
        return batch.update(**found._asdict())

    def predict_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict."""
        return self.test_step(batch, *args, **kwargs)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the teachers came from, and whose statistics these are."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["categories"] = list(self.categories)
        checkpoint["teachers"] = self.teacher_records

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over where the teachers came from."""
        super().on_load_checkpoint(checkpoint)
        self.teacher_records = list(checkpoint.get("teachers", []))
        self._missing, self._pretrained = [], []


def loss_and_map(network: Any, images: torch.Tensor, category: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each image, float32 ``(B,)``, and the anomaly maps, float32 ``(B, 1, H, W)``."""
    found = network.deviations(images, category)
    size = (int(images.shape[-2]), int(images.shape[-1]))
    return found.losses, network.anomaly_map(found, size, category)
