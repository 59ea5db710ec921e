"""The network of Uninformed Students: teachers, students, statistics and the anomaly map (arXiv 1911.02357)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F

from uad_plugins.models.uninformed_students.grids import Grid
from uad_plugins.models.uninformed_students.networks import DIMENSIONS, PatchNetwork, patch_networks


@dataclass
class Deviations:
    """What the students deviate by, for each scale (sections 3.2 and 3.3).

    Attributes:
        losses: float32 ``(B,)``: squared distance of student and normalised teacher descriptor, averaged over students and
            pixels, summed over scales.
        errors: float32 ``(B, S, h, w)``, ``|mean_i S_i - T|^2``.
        variances: float32 ``(B, S, h, w)``, see ``predictive_variance``.
    """

    losses: torch.Tensor
    errors: torch.Tensor
    variances: torch.Tensor


class UninformedStudentsModel(nn.Module):
    """Ensembles of students that regress the descriptors of frozen teachers, at one or several scales.

    Args:
        patch_sizes: Receptive field of each scale, of 17, 33, 65.
        students: Networks in each ensemble (M).
        width: Channels of the hidden layers as a share of the paper's.
        stride: A descriptor is computed for every ``stride``-th pixel; the map is resized to the input.
        categories: Number of categories with statistics of their own; 0: statistics are global.

    Attributes:
        feature_mean: float32 ``(S, K, 128)``, mean of the teacher's descriptors over the training images (of their
            pixels, the output stride's), where ``K`` is the number of categories or 1. ``feature_std`` likewise; zero until
            set.
        score_mean: float32 ``(S, K, 2)``, mean of error and variance over the pixels of held-out normal images.
            ``score_std`` likewise.

    Raises:
        ValueError: A patch size or stride that does not exist, or no student.
    """

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    score_mean: torch.Tensor
    score_std: torch.Tensor

    def __init__(
        self,
        patch_sizes: Sequence[int] = (17, 33, 65),
        students: int = 3,
        width: float = 1.0,
        stride: int = 1,
        categories: int = 0,
    ) -> None:
        super().__init__()
        if students < 1:
            raise ValueError("at least one student is needed")
        self.teachers = nn.ModuleList(PatchNetwork(p, 1, width, stride) for p in patch_sizes)
        self.students = nn.ModuleList(PatchNetwork(p, students, width, stride) for p in patch_sizes)
        self.teachers.requires_grad_(False)
        rows = max(1, categories)
        self.by_category = categories > 0
        self.register_buffer("feature_mean", torch.zeros(len(patch_sizes), rows, DIMENSIONS))
        self.register_buffer("feature_std", torch.zeros(len(patch_sizes), rows, DIMENSIONS))
        self.register_buffer("score_mean", torch.zeros(len(patch_sizes), rows, 2))
        self.register_buffer("score_std", torch.ones(len(patch_sizes), rows, 2))

    @property
    def normalised(self) -> bool:
        """Whether the statistics of the teachers' descriptors are set."""
        return bool((self.feature_std > 0).all())

    @staticmethod
    def row(statistics: torch.Tensor, category: torch.Tensor | None) -> torch.Tensor:
        """Return one scale's statistics ``(K, n)`` as ``(B or 1, n)``, each image's category's where there are any."""
        return statistics[:1] if category is None else statistics[category]

    def targets(self, images: torch.Tensor, grid: Grid | None = None) -> list[torch.Tensor]:
        """Return the teachers' descriptors of each scale, float32 ``(B, 1, 128, h, w)``."""
        with torch.no_grad():
            return [teacher.dense(images, grid) for teacher in patch_networks(self.teachers)]

    def _compared(
        self, images: torch.Tensor, category: torch.Tensor | None, grid: Grid | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield for each scale the students' descriptors ``(B, M, 128, h, w)`` and the normalised ones of the teacher."""
        scales = zip(self.targets(images, grid), patch_networks(self.students), strict=True)
        for scale, (target, student) in enumerate(scales):
            mean = self.row(self.feature_mean[scale], category)[:, None, :, None, None]
            std = self.row(self.feature_std[scale], category)[:, None, :, None, None]
            yield student.dense(images, grid), (target - mean) / std

    def losses(self, images: torch.Tensor, category: torch.Tensor | None = None, grid: Grid | None = None) -> torch.Tensor:
        """Return the losses of ``deviations`` alone: all that training needs."""
        return total(regression_loss(*pair) for pair in self._compared(images, category, grid))

    def deviations(self, images: torch.Tensor, category: torch.Tensor | None = None, grid: Grid | None = None) -> Deviations:
        """Compare students and teachers.

        Args:
            images: float32 ``(B, 3, H, W)``, normalised.
            category: int64 ``(B,)``, row of the statistics; only where they are by category.
            grid: Pixels that are compared; None: those of the model's stride.
        """
        losses, errors, variances = [], [], []
        for predicted, wanted in self._compared(images, category, grid):
            losses.append(regression_loss(predicted, wanted))
            centre = predicted.mean(dim=1, keepdim=True)
            errors.append((centre - wanted).square().sum(dim=2)[:, 0])
            variances.append(predictive_variance(predicted, centre))
        return Deviations(total(losses), torch.stack(errors, dim=1), torch.stack(variances, dim=1))

    def anomaly_map(self, found: Deviations, size: tuple[int, int], category: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``mean over scales of z(error) + z(variance)``, float32 ``(B, 1, H, W)`` (sections 3.3 and 3.4).

        A single student has no variance; its map is ``z(error)``.
        """
        mean = torch.stack([self.row(rows, category) for rows in self.score_mean], dim=1)[..., None, None]
        std = torch.stack([self.row(rows, category) for rows in self.score_std], dim=1)[..., None, None]
        scores = (found.errors - mean[:, :, 0]) / std[:, :, 0]
        network = patch_networks(self.students)[0]
        if network.copies > 1:
            scores = scores + (found.variances - mean[:, :, 1]) / std[:, :, 1]
        fused = scores.mean(dim=1, keepdim=True)
        if fused.shape[-2:] != size:
            # By the stride and cut, not to the size: where that is no multiple of it the map would be squeezed.
            whole = (int(fused.shape[-2]) * network.stride, int(fused.shape[-1]) * network.stride)
            fused = F.interpolate(fused, size=whole, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
        return fused

    def forward(self, images: torch.Tensor, category: torch.Tensor | None = None) -> InferenceBatch:
        """Return score ``(B, 1)``, the map's maximum, and map ``(B, 1, H, W)``.

        Args:
            images: float32 ``(B, 3, H, W)``, normalised.
            category: int64 ``(B,)``; needed where the statistics are by category.

        Raises:
            ValueError: The statistics are by category and none is given.
        """
        if self.by_category and category is None:
            raise ValueError("the statistics are by category: each image needs its category")
        category = category if self.by_category else None
        size = (int(images.shape[-2]), int(images.shape[-1]))
        anomaly_map = self.anomaly_map(self.deviations(images, category), size, category)
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)


def regression_loss(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of descriptors ``(B, M, 128, h, w)`` and ``(B, 1, 128, h, w)``, mean of each image."""
    return (predicted - wanted).square().sum(dim=2).mean(dim=(1, 2, 3))


def predictive_variance(predicted: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Return the mean over students of ``|S_i - mean_j S_j|^2``, float32 ``(B, h, w)``.

    The same as the paper's mean of squares minus square of the mean, but without its cancellation in low precision.

    Args:
        predicted: ``(B, M, 128, h, w)``, of the students.
        centre: ``(B, 1, 128, h, w)``, their mean.
    """
    return (predicted - centre).square().sum(dim=2).mean(dim=1)


def total(losses: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum over scales."""
    return torch.stack(list(losses)).sum(dim=0)


class Moments:
    """Mean and standard deviation of streamed values, by row, in float64.

    Args:
        shape: ``(rows, ...)`` of the statistics.
        device: Where the values are.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        # Three sums in one tensor: processes add theirs up in one call.
        self.sums = torch.zeros(3, *shape, dtype=torch.float64, device=device)

    def add(self, row: int, values: torch.Tensor) -> None:
        """Add values ``(n, ...)`` to a row."""
        values = values.double()
        self.sums[0, row] += len(values)
        self.sums[1, row] += values.sum(dim=0)
        self.sums[2, row] += values.square().sum(dim=0)

    @property
    def empty(self) -> bool:
        """Whether there was no value."""
        return not bool((self.sums[0] > 0).any())

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation, float32; rows without values get those of all rows together.

        A value that never varies has the deviation 1: dividing by it must stay possible.
        """
        together = self.sums.sum(dim=1, keepdim=True)
        count, total, squares = torch.where(self.sums[:1] > 0, self.sums, together)
        mean = total / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
        std = torch.where(variance > 1e-12 * mean.square() + 1e-24, variance.sqrt(), 1.0)
        return mean.float(), std.float()
