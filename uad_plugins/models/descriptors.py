"""Unit descriptors of teacher and student: how far apart they are, and what is learnt from that where a part is bad."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

Features = Mapping[str, torch.Tensor]

Groups = Mapping[int, torch.Tensor]
"""Rows of a batch, int64, by product."""

MARGIN = 1.0
"""Squared distance from the teacher that a student has to keep on synthetic anomalies.

Features after a ReLU are at most 2 apart; those of unrelated places 0.6 to 0.7, with the backbone that ships.
"""

GOOD, ANOMALOUS = 0.02, 0.2
"""Opacity up to which a descriptor's cell counts as good, and from which as anomalous; between them it is neither."""

EASY = 0.1
"""What places that are learnt well already count beside the others, with hard mining (arXiv 2405.14325, section 3.4)."""


def distances(teacher: Features, student: Features) -> list[torch.Tensor]:
    """Return the squared distances of unit descriptors, ``(B, h, w)`` of each layer (arXiv 2103.04257, equation 1)."""
    return [_apart(F.normalize(teacher[layer]), F.normalize(student[layer])) for layer in teacher]


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).square().sum(dim=1)


def _covered(opacity: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the mean opacity in each cell of distances ``(B, h, w)``."""
    return F.interpolate(opacity, like.shape[-2:], mode="area")[:, 0]


def anomaly_loss(
    teacher: Features,
    student: Features,
    opacity: torch.Tensor,
    weight: float,
    mining: float = 0.0,
    groups: Groups | None = None,
) -> torch.Tensor:
    """Pull the student to its teacher where the part is good, and away from it where an anomaly was drawn.

    Args:
        teacher: Features ``(B, C, h, w)`` by layer.
        student: The same of the student.
        opacity: Of the anomalies, float32 ``(B, 1, H, W)``, 0..1.
        weight: Of the second part, a hinge at ``MARGIN``.
        mining: Share of the good places of a layer in the batch, those that the student follows best, which count
            ``EASY`` of the others, 0..1 exclusive; the mean weight stays 1.
        groups: Rows of the batch, int64, by product, each of which is mined by itself; None: all of them together.

    Returns:
        The loss of each image, float32 ``(B,)``: that of STFPM where nothing was drawn and nothing is mined.
    """
    losses = []
    for distance in distances(teacher, student):
        covered, apart = _covered(opacity, distance), distance.float()
        good = (covered <= GOOD).to(apart)
        near = F.relu(MARGIN - apart) * (covered >= ANOMALOUS)
        losses.append((apart * _mined(apart, good, mining, groups) + weight * near).mean(dim=(1, 2)))
    return torch.stack(losses).sum(dim=0)


def well_learnt(apart: torch.Tensor, share: float, among: torch.Tensor | None = None) -> torch.Tensor:
    """Return where distances are among their smallest, bool as they: the share is of those ``among`` which are counted."""
    return apart < torch.quantile(apart if among is None else apart[among], share)


def _mined(apart: torch.Tensor, good: torch.Tensor, share: float, groups: Groups | None) -> torch.Tensor:
    """Return weights of the good places, of which those that are nearest count less: their mean is 1, in each group."""
    if share and groups is not None and len(groups) > 1:
        weights = torch.empty_like(good)
        for rows in groups.values():
            weights[rows] = _mined(apart[rows], good[rows], share, None)
        return weights
    if not share or not good.any():
        return good
    weights = good * torch.where(well_learnt(apart.detach(), share, good > 0), EASY, 1.0)
    return weights * (good.sum() / weights.sum())


def specialist_loss(
    teacher: Features,
    specialist: Features,
    student: Features,
    opacity: torch.Tensor,
    weight: float,
    mining: float = 0.0,
    groups: Groups | None = None,
) -> torch.Tensor:
    """Pull the student to a specialist, and as far away from the teacher where an anomaly was drawn as that one is.

    What a specialist makes of an anomaly cannot be foreseen in all detail, least of all in the first layer, which sees
    little of the product. A student that is told this alone takes the mean of what may come, which is near the teacher.

    Args:
        teacher: Features ``(B, C, h, w)`` by layer.
        specialist: The same of the specialist, or the mean of several.
        student: The same of the student.
        opacity: Of the anomalies, float32 ``(B, 1, H, W)``, 0..1.
        weight: Of the second part: squared distance from the teacher that the student lacks.
        mining: As for ``anomaly_loss``, of all places: those where the student is nearest to the specialist count less.
        groups: As for ``anomaly_loss``.

    Returns:
        The loss of each image, float32 ``(B,)``.
    """
    losses = []
    for layer in teacher:
        origin, goal, place = (F.normalize(features[layer]) for features in (teacher, specialist, student))
        apart, lacking = _apart(goal, place).float(), _apart(origin, goal).float() - _apart(origin, place).float()
        bad = _covered(opacity, apart) >= ANOMALOUS
        near = apart * _mined(apart, torch.ones_like(apart), mining, groups)
        losses.append((near + weight * F.relu(lacking) * bad).mean(dim=(1, 2)))
    return torch.stack(losses).sum(dim=0)
