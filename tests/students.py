"""Models of the two distillation methods, and features, that several tests look at."""

from __future__ import annotations

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule

SIZE = (64, 64)


def features(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(batch, 8 * i, 8, 8, generator=generator) for i in (1, 2, 3)}


def build(cls, **options):
    torch.manual_seed(0)
    return cls(
        backbone="resnet18",
        weights="bundled",
        pre_processor=AnomalibModule.configure_pre_processor(SIZE),
        visualizer=False,
        **options,
    )


def randomised(model):
    """Give every BatchNorm of the student a scale: timm starts the last one of a block at zero."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.weight.requires_grad:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def in_training(cls, monkeypatch, **options):
    """Build a model whose training steps can be called without a trainer."""
    model = randomised(build(cls, **options)).train()
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    return model


def good_batch(images):
    return ImageBatch(image=images, gt_label=torch.zeros(len(images), dtype=torch.bool))
