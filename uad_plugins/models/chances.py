"""Chance in a training: what is drawn is said by seed, epoch, batch and process, not by the global random state.

A resumed training on the same kind of device sees what an unbroken one would, and each process something else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

ANOMALIES, DROPOUT, AUGMENTATION = (), (1,), (2,)
"""Purposes of the chances of a training batch."""


def seed_of(module: Any, batch_idx: int, purpose: tuple[int, ...]) -> int:
    """Return the seed of a batch for a purpose.

    Args:
        module: A ``LightningModule``, or whatever else has its ``current_epoch`` and ``global_rank``.
        batch_idx: Of the batch in its epoch.
        purpose: One of those above, or another's own.
    """
    of_batch = [torch.initial_seed(), module.current_epoch, batch_idx, module.global_rank]
    state = np.random.SeedSequence(of_batch, spawn_key=purpose).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def chances_of(module: Any, batch_idx: int, purpose: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Generator:
    """Return the source of chance of a batch for a purpose; see ``seed_of``."""
    return torch.Generator(device).manual_seed(seed_of(module, batch_idx, purpose))
