"""Checkpoints that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.engine.plugins import AnomalibCheckpointIO

from uad_plugins.artifacts import Run, atomic_path

MONITOR = "val_loss"
"""What the checkpoint is chosen by: the mean over categories of the loss on held-out normal images."""


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint to a temporary name, flushes it to the disk, then renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save; whoever reads ``path`` meanwhile sees the old checkpoint or the new one."""
        del storage_options
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class BestAndLast(ModelCheckpoint):
    """Keeps the best checkpoint by held-out normal images as ``model.ckpt`` and the newest as ``last.ckpt``."""

    def __init__(self, run: Run) -> None:
        super().__init__(
            dirpath=run.folder,
            filename=run.checkpoint.stem,
            monitor=MONITOR,
            mode="min",
            save_top_k=1,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
