"""Small trainings that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uad_plugins.config import TrainConfig, merge, resolve
from uad_plugins.training.train import train

SMALL = {
    "model": {"name": "stfpm", "backbone": "resnet18", "weights": "bundled"},
    "data": {"image_size": 64, "train_batch_size": 8, "num_workers": 0},
    "optimizer": {"lr": 1.0, "schedule": "cosine"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
}


def small_config(over: dict[str, Any] | None = None) -> TrainConfig:
    """A configuration that trains in a second, with changes."""
    return resolve(flags=merge(SMALL, over or {}), environment={})


def small_run(data: Path, out: Path, over: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Train it and return its metrics."""
    metrics = train(small_config(over), data, out, interactive=False, **options)
    assert metrics is not None
    return metrics
