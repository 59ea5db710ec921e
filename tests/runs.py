"""Small trainings that several tests look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uad_plugins.config import TrainConfig, merge, resolve
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.quantization.quantize import Order, quantize
from uad_plugins.training.train import train

SMALL = {
    "model": {"name": "stfpm", "backbone": "resnet18", "weights": "bundled"},
    "data": {"image_size": 64, "train_batch_size": 8, "num_workers": 0},
    "optimizer": {"lr": 1.0, "schedule": "cosine"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
}

# Uninformed Students on two scales, and what a teacher of theirs is distilled with.
TEACHER = {"steps": 6, "batch_size": 8, "lr": 1e-3}
OPTIONS = {"patch_sizes": [17, 33], "students": 2, "width": 0.0625, "stride": 4, "teacher": TEACHER}
OVER = {
    "model": {"name": "uninformed_students", "options": OPTIONS},
    "data": {"val_fraction": 0.3},
    "optimizer": {"name": "adam", "lr": 1e-3},
}


def over(**changes: Any) -> dict[str, Any]:
    """Return ``OVER`` with changes of its options."""
    merged = json.loads(json.dumps(OVER))
    merged["model"]["options"].update(changes)
    return merged


def small_config(over: dict[str, Any] | None = None) -> TrainConfig:
    """A configuration that trains in a second, with changes."""
    return resolve(flags=merge(SMALL, over or {}), environment={})


def small_run(data: Path, out: Path, over: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Train it and return its metrics."""
    metrics = train(small_config(over), data, out, interactive=False, **options)
    assert metrics is not None
    return metrics


def small_datamodule(root: Path, **options: Any) -> UnifiedDataModule:
    """The data of a training with ``OVER``."""
    return UnifiedDataModule(str(root), image_size=64, val_fraction=0.3, num_workers=0, **options)


INT8_BACKENDS = [("openvino-int8", {}), ("tensorrt-int8", {}), ("nncf-qat", {"epochs": 1, "accelerator": "cpu"})]
"""Each with options that take little time."""


def quantized_as_it_was(run: Path, data: Path, out: Path, backend: str, options: dict[str, Any]) -> None:
    """Quantize a small run: maps and verdicts have to stay what they were."""
    manifest = quantize(Order(run, out, backend, samples=12, data=str(data), options=options))
    assert manifest.agreement
    for agreement in manifest.agreement.values():
        assert agreement["map_l2"] < 0.15
        assert agreement["map_rank"] > 0.9
    assert manifest.auroc["mean"]["image_auroc"]["drop"] < 0.1
