"""Variation of the training images: what else a good part may look like at the line."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from uad_plugins.config import AugmentationConfig
from uad_plugins.models.chances import AUGMENTATION, seed_of


class Augmentation(Callback):
    """Varies the images of each training batch on its device, before the model's own pre-processing.

    Each variation is kornia's, drawn for each image by itself. What comes in from outside the image is its reflection.

    Args:
        config: What varies, and how much.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        from kornia import augmentation as kornia

        share, steps = config.share, list[Any]()
        if config.rotate or config.shift or config.scale:
            steps.append(
                kornia.RandomAffine(
                    degrees=config.rotate,
                    translate=(config.shift, config.shift),
                    scale=(1 - config.scale, 1 + config.scale),
                    padding_mode="reflection",
                    p=share,
                )
            )
        if config.flip in ("horizontal", "both"):
            steps.append(kornia.RandomHorizontalFlip(p=share / 2))
        if config.flip in ("vertical", "both"):
            steps.append(kornia.RandomVerticalFlip(p=share / 2))
        if config.brightness:
            steps.append(kornia.RandomBrightness((1 - config.brightness, 1 + config.brightness), p=share))
        if config.contrast:
            steps.append(kornia.RandomContrast((1 - config.contrast, 1 + config.contrast), p=share))
        self.vary = kornia.AugmentationSequential(*steps, data_keys=["image"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Vary ``batch.image``, float32 ``(B, 3, H, W)``, RGB in 0..1."""
        with torch.random.fork_rng(devices=[]):
            # kornia draws by the generator of the CPU, wherever the images are.
            torch.random.default_generator.manual_seed(seed_of(pl_module, batch_idx, AUGMENTATION))
            batch.image = self.vary(batch.image)


def augmentation(config: AugmentationConfig) -> list[Callback]:
    """Return what varies training images, for the callbacks of a trainer: nothing where nothing varies."""
    return [Augmentation(config)] if config else []


def varies(trainer: Trainer) -> bool:
    """Tell whether a training varies its images."""
    return any(isinstance(callback, Augmentation) for callback in trainer.callbacks)


def vary(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
    """Vary a batch as the training does, in a pass over the images beside it."""
    for callback in trainer.callbacks:
        if isinstance(callback, Augmentation):
            callback.on_train_batch_start(trainer, module, batch, batch_idx)
