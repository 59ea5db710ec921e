"""Checkpoints that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.models import AnomalibModule

from uad_plugins.artifacts import atomic_path, checked

MONITOR = "val_loss"
"""What the checkpoint is chosen by: the mean over categories of the loss on held-out normal images."""


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint to a temporary name, flushes it to the disk, then renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save; whoever reads ``path`` meanwhile sees the old checkpoint or the new one."""
        del storage_options
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def epochs_of(path: Path, model: AnomalibModule) -> int:
    """Return how many epochs a checkpoint was trained for.

    Args:
        path: The checkpoint.
        model: A model of its class.

    Raises:
        UadxError: It is damaged.
    """
    reader = AtomicCheckpointIO(extra_safe_globals=list(model.checkpoint_safe_globals()))
    return int(checked(path, lambda file: reader.load_checkpoint(file, map_location="cpu")["epoch"])) + 1


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint by held-out normal images.

    Args:
        path: Where.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(
            dirpath=path.parent,
            filename=path.stem,
            monitor=MONITOR,
            mode="min",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was the best so far, also when the folder lies elsewhere now."""
        folder = Path(str(self.dirpath))

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else path

        moved = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[key] = here(state_dict.get(key, ""))
        moved["best_k_models"] = {here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict(moved)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint of the last whole epoch, whether it is the best or not.

    To be given to the trainer behind ``BestCheckpoint``: what it writes includes what the other has decided.

    Args:
        path: Where.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(
            dirpath=path.parent,
            filename=path.stem,
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
