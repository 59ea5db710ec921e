"""The losses that a teacher of Uninformed Students is distilled by, against values computed by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from uad_plugins.models.uninformed_students import distillation
from uad_plugins.models.uninformed_students.distillation import (
    LossWeights,
    compactness_loss,
    knowledge_loss,
    metric_loss,
    total_loss,
)
from uad_plugins.models.uninformed_students.networks import PatchNetwork


def test_knowledge_loss_by_hand():
    decoded = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    target = torch.tensor([[0.0, 4.0], [3.0, 0.0]])
    assert knowledge_loss(decoded, target) == pytest.approx(((1 + 4) + 9) / 2)


def test_metric_loss_by_hand():
    descriptor, positive, negative = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    # To the descriptor 4, to the positive 5: the nearer counts.
    assert metric_loss(descriptor, positive, negative, 5.0) == pytest.approx(5 + 1 - 4)
    assert metric_loss(descriptor, positive, negative, 1.0) == 0


def test_the_negative_is_swapped_to_the_positive_where_that_is_closer():
    descriptor, positive, negative = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.5, 0.0]])
    assert metric_loss(descriptor, positive, negative, 1.0) == pytest.approx(1 + 1 - 0.25)
    # The other way round the distance to the descriptor is the smaller one.
    assert metric_loss(positive, descriptor, negative, 1.0) == pytest.approx(1 + 1 - 0.25)


def test_compactness_is_over_dimensions():
    base = torch.randn(50, 1)
    # Two dimensions that say the same, one opposite: three pairs of correlation 1, each counted twice.
    same = torch.cat([base, 2 * base + 3, -base], dim=1)
    assert compactness_loss(same) == pytest.approx(6.0, abs=1e-4)
    hadamard = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert compactness_loss(hadamard) == pytest.approx(0.0, abs=1e-6)
    # Samples that say the same are no matter: over samples these would be correlated entirely.
    assert compactness_loss(hadamard.repeat(2, 1)) == pytest.approx(0.0, abs=1e-6)


def test_compactness_by_hand():
    descriptor = torch.tensor([[0.0, 0.0], [1.0, 4.0], [2.0, -1.0]])
    x, y = np.array([-1.0, 0, 1]), np.array([-1.0, 3, -2])
    expected = 2 * (float(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y))) ** 2
    assert compactness_loss(descriptor) == pytest.approx(expected, abs=1e-6)
    numpy_says = np.corrcoef(torch.randn(40, 5, generator=torch.Generator().manual_seed(1)).numpy().T)
    drawn = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    assert compactness_loss(drawn) == pytest.approx((numpy_says**2).sum() - 5, abs=1e-4)


def test_the_total_is_the_weighted_sum():
    teacher, decoder = PatchNetwork(17, 1, 1 / 16, 1), nn.Linear(128, 16)
    patches, twins, target = torch.randn(6, 3, 17, 17), torch.randn(6, 3, 17, 17), torch.randn(6, 16)
    with torch.no_grad():
        descriptor, positive = teacher(patches)[:, 0], teacher(twins)[:, 0]
        parts = (
            knowledge_loss(decoder(descriptor), target),
            metric_loss(descriptor, positive, descriptor.roll(1, 0), 1.0),
            compactness_loss(descriptor),
        )
        for weights in [(1, 0, 1), (0, 2, 0), (0.5, 1, 3)]:
            found = total_loss(teacher, decoder, (patches, twins), target, LossWeights(*weights))
            assert found == pytest.approx(float(sum(w * part for w, part in zip(weights, parts, strict=True))), rel=1e-5)


def test_the_target_is_standardised_by_dimension(tmp_path, monkeypatch):
    """The weights of the losses mean the same for every pretrained network."""
    seen = []

    def watched(teacher, decoder, batch, target, weights):
        seen.append(target)
        return total_loss(teacher, decoder, batch, target, weights)

    monkeypatch.setattr(distillation, "total_loss", watched)
    scales = torch.tensor([0.01, 1.0, 300.0])

    def batches(step):
        return torch.randn(16, 3, 17, 17, generator=torch.Generator().manual_seed(step)), None

    distillation.distil(
        17,
        1 / 16,
        lambda patches: (patches[:, :, 0, 0] + 5) * scales,
        batches,
        steps=16,
        lr=1e-4,
        weight_decay=0.0,
        weights=LossWeights(),
        seed=0,
        checkpoint=tmp_path / "checkpoint",
    )
    found = torch.cat(seen)
    assert torch.allclose(found.mean(dim=0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(found.std(dim=0), torch.ones(3), rtol=1e-3)
