"""Distilling a teacher: a patch network learns to describe patches as a pretrained network does (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uad_plugins.artifacts import atomic_path
from uad_plugins.errors import UadxError
from uad_plugins.models.uninformed_students.networks import DIMENSIONS, PatchNetwork
from uad_plugins.progress import Progress

CHECKPOINT_EVERY = 250
"""Steps between checkpoints."""

STANDARDISED_OVER = 16
"""Batches whose features say how the target is standardised."""

STATE = ("teacher", "decoder", "optimizer", "step", "recent")
"""What a checkpoint holds."""

Batch = tuple[torch.Tensor, torch.Tensor | None]
"""Patches and their slightly changed twins, float32 ``(N, 3, p, p)``, normalised; the metric loss alone needs twins."""


@dataclass(frozen=True)
class LossWeights:
    """Shares of the three losses in their sum.

    Attributes:
        knowledge: Of matching the pretrained network's feature.
        metric: Of the triplet loss.
        compactness: Of the correlation between descriptor dimensions.
        margin: Of the triplet loss.
    """

    knowledge: float = 1.0
    metric: float = 0.0
    compactness: float = 1.0
    margin: float = 1.0


def knowledge_loss(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of decoded descriptors and target features ``(N, n)``, mean over ``N``."""
    return (decoded - target).square().sum(dim=1).mean()


def metric_loss(descriptor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, margin: float) -> torch.Tensor:
    """Return the triplet loss with in-triplet hard negatives, mean over ``N``.

    The negative distance is the smaller one of negative to descriptor and negative to positive: the two are swapped where
    the positive is closer to the negative.

    Args:
        descriptor: ``(N, d)``, of patches.
        positive: ``(N, d)``, of the same patches shifted and changed in intensity.
        negative: ``(N, d)``, of patches of other images.
        margin: Distance by which negatives must be further.
    """
    near = (descriptor - positive).square().sum(dim=1)
    far = torch.minimum((descriptor - negative).square().sum(dim=1), (positive - negative).square().sum(dim=1))
    return (margin + near - far).clamp(min=0).mean()


def compactness_loss(descriptor: torch.Tensor) -> torch.Tensor:
    """Return the sum of squared correlations between different *dimensions* of ``(N, d)`` over the batch.

    Squared, not absolute: over a small batch even independent dimensions correlate by chance, and pushing all of those
    down as hard as the large ones leaves little for the knowledge to be distilled.
    """
    centred = descriptor - descriptor.mean(dim=0)
    unit = centred / centred.norm(dim=0).clamp(min=1e-8)
    correlation = (unit.T @ unit).square()
    return correlation.sum() - correlation.diagonal().sum()


def total_loss(
    teacher: PatchNetwork, decoder: nn.Linear, batch: Batch, target: torch.Tensor, weights: LossWeights
) -> torch.Tensor:
    """Return the weighted sum of the losses for one batch; a loss of weight 0 is not computed."""
    patches, twins = batch
    descriptor = teacher(patches)[:, 0]
    loss = descriptor.new_zeros(())
    if weights.knowledge:
        loss = loss + weights.knowledge * knowledge_loss(decoder(descriptor), target)
    if weights.metric:
        assert twins is not None  # whoever weighs the metric loss asks for them
        # Neighbours in a batch are patches of different images.
        positive, negative = teacher(twins)[:, 0], descriptor.roll(1, dims=0)
        loss = loss + weights.metric * metric_loss(descriptor, positive, negative, weights.margin)
    if weights.compactness:
        loss = loss + weights.compactness * compactness_loss(descriptor)
    return loss


def distil(
    patch_size: int,
    width: float,
    target: Callable[[torch.Tensor], torch.Tensor],
    batches: Callable[[int], Batch],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    weights: LossWeights,
    seed: int,
    checkpoint: Path,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> tuple[PatchNetwork, float]:
    """Train one teacher; an interrupted distillation goes on from its checkpoint to the same result.

    Each dimension of the target is standardised, so that the weights of the losses mean the same for every pretrained
    network: with features as small as some have, compactness would be all that is learnt.

    Args:
        patch_size: 17, 33 or 65.
        width: Share of the paper's channels.
        target: Patches -> feature of the pretrained network, float32 ``(N, n)``.
        batches: Step -> its batch; must depend on the step alone.
        steps: How many.
        lr: Learning rate of Adam.
        weight_decay: Of Adam.
        weights: Of the losses.
        seed: Of the initial weights.
        checkpoint: File that keeps the state every ``CHECKPOINT_EVERY`` steps; removed by whoever stores the teacher.
        device: Where it runs; None: the CPU.
        progress: Called with steps done and all steps.

    Returns:
        The teacher, and the loss averaged over the last tenth of the steps.

    Raises:
        UadxError: The loss is no finite number.
    """
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = PatchNetwork(patch_size, 1, width).to(device)
        mean, std = _feature_statistics(target, batches, min(STANDARDISED_OVER, steps), device)
        decoder = nn.Linear(DIMENSIONS, len(mean)).to(device)
    optimizer = torch.optim.Adam([*teacher.parameters(), *decoder.parameters()], lr=lr, weight_decay=weight_decay)
    first, recent = 0, 0.0
    state = _read(checkpoint, device)
    if state is not None:
        teacher.load_state_dict(state["teacher"])
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        first, recent = state["step"], state["recent"]
    counted = max(1, steps // 10)
    for step in range(first, steps):
        patches, twins = (part if part is None else part.to(device) for part in batches(step))
        assert patches is not None  # only twins may be left out
        with torch.no_grad():
            wanted = (target(patches) - mean) / std
        loss = total_loss(teacher, decoder, (patches, twins), wanted, weights)
        if not bool(torch.isfinite(loss)):
            raise UadxError(f"distilling the teacher: the loss became {float(loss.detach())} at step {step}", "lower its lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step >= steps - counted:
            recent += float(loss.detach()) / counted
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
            _save(checkpoint, teacher, decoder, optimizer, step + 1, recent)
        if progress is not None:
            progress(step + 1, steps)
    return teacher.cpu().requires_grad_(False).eval(), recent


def _feature_statistics(
    target: Callable[[torch.Tensor], torch.Tensor], batches: Callable[[int], Batch], count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the target's dimensions, ``(n,)`` each, over the first batches."""
    with torch.no_grad():
        features = torch.cat([target(batches(step)[0].to(device)) for step in range(count)])
    std = features.std(dim=0)
    # A feature that never varies is left as it is.
    return features.mean(dim=0), torch.where(std > 1e-6, std, 1.0)


def _read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Return what ``_save`` wrote; None where there is none, or a damaged one: then the distillation starts anew."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return {key: state[key] for key in STATE}
    except Exception:
        # torch and zipfile raise many kinds for a damaged file.
        return None


def _save(
    path: Path, teacher: PatchNetwork, decoder: nn.Linear, optimizer: torch.optim.Optimizer, step: int, recent: float
) -> None:
    state = {
        "teacher": teacher.state_dict(),
        "decoder": decoder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "recent": recent,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
