"""Losses of unit descriptors: where a part is good, and where an anomaly was drawn."""

import math

import pytest
import torch
from students import features
from torch.nn import functional as F

from uad_plugins.models.descriptors import EASY, MARGIN, anomaly_loss, distances, specialist_loss
from uad_plugins.models.stfpm import MeanSTFPMLoss


@pytest.mark.parametrize("batch", [1, 5])
def test_without_defects_the_loss_is_the_methods(batch):
    teacher, student = features(batch), features(batch, 1)
    found = anomaly_loss(teacher, student, torch.zeros(batch, 1, 32, 32), 3.0)
    assert found.shape == (batch,)
    assert torch.allclose(found.mean(), MeanSTFPMLoss()(teacher, student))


def test_a_defect_pushes_until_the_margin():
    teacher = {"layer1": F.normalize(torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)))}
    opacity = torch.zeros(1, 1, 32, 32)
    opacity[..., :16, :] = 1.0
    near = {"layer1": (teacher["layer1"] * 2).requires_grad_()}
    loss = anomaly_loss(teacher, near, opacity, 3.0)
    # Half of the descriptors are defective, and as near as can be.
    assert loss.item() == pytest.approx(3.0 * MARGIN / 2)
    far = {"layer1": -teacher["layer1"]}
    far["layer1"][..., 4:, :] *= -1
    assert anomaly_loss(teacher, far, opacity, 3.0).item() == pytest.approx(0, abs=1e-6)
    student = {"layer1": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()}
    # Towards the teacher where it is good, away from it where it is not and the margin is not kept.
    with torch.no_grad():
        student["layer1"] += 2 * teacher["layer1"]
    before = (F.normalize(student["layer1"]) - teacher["layer1"]).square().sum(dim=1)
    (gradient,) = torch.autograd.grad(anomaly_loss(teacher, student, opacity, 3.0).sum(), student["layer1"])
    after = (F.normalize(student["layer1"] - gradient) - teacher["layer1"]).square().sum(dim=1)
    pushed = before[:, :4] < MARGIN
    assert pushed.any()
    assert (after[:, :4][pushed] > before[:, :4][pushed]).all()
    assert (after[:, 4:] < before[:, 4:]).all()


def test_an_edge_of_a_defect_is_neither_good_nor_bad():
    teacher, student = features(1), features(1, 1)
    opacity = torch.full((1, 1, 32, 32), 0.1)
    assert anomaly_loss(teacher, student, opacity, 3.0).item() == 0


def test_the_best_learnt_of_the_good_places_count_less():
    teacher, student = features(2), features(2, 1)
    opacity = torch.zeros(2, 1, 32, 32)
    opacity[0, :, :16] = 1.0
    expected = 0
    for apart in distances(teacher, student):
        good = torch.ones_like(apart)
        good[0, : apart.shape[1] // 2] = 0
        # Of the good places of both images together the farthest quarter counts in full.
        farthest = apart[good > 0].sort().values[-int(good.sum()) // 4 :]
        weight = good * torch.where(apart >= farthest[0], 1.0, EASY)
        weight = weight * good.sum() / weight.sum()
        expected = expected + (weight * apart + 3 * (1 - good) * (MARGIN - apart).clamp(min=0)).mean(dim=(1, 2))
    assert torch.allclose(anomaly_loss(teacher, student, opacity, 3.0, 0.75), expected)
    assert not torch.allclose(anomaly_loss(teacher, student, opacity, 3.0), expected)


@pytest.mark.parametrize("taught", [False, True])
def test_products_may_be_mined_by_themselves(taught):
    teacher, student, specialist = features(5), features(5, 1), features(5, 2)
    opacity = torch.zeros(5, 1, 32, 32)
    opacity[::2, :, :16] = 1.0

    def loss(rows, groups=None):
        some = [{name: each[rows] for name, each in part.items()} for part in (teacher, specialist, student)]
        function, some = (specialist_loss, some) if taught else (anomaly_loss, some[::2])
        return function(*some, opacity[rows], 3.0, 0.75, groups)

    groups = {0: torch.tensor([1, 2, 4]), 7: torch.tensor([0, 3])}
    found = loss(torch.arange(5), groups)
    assert all(torch.allclose(found[rows], loss(rows)) for rows in groups.values())
    assert not torch.allclose(found, loss(torch.arange(5)))


def test_nothing_is_mined_where_nothing_is_good():
    teacher, student = features(1), features(1, 1)
    opacity = torch.ones(1, 1, 32, 32)
    assert torch.equal(anomaly_loss(teacher, student, opacity, 3.0, 0.9), anomaly_loss(teacher, student, opacity, 3.0))


@pytest.mark.parametrize(("angle", "expected"), [(0.6, 0.0), (0.3, None), (1.2, 0.0)])
def test_a_student_has_to_be_as_far_from_its_teacher_as_the_specialist_where_it_is_bad(angle, expected):
    """The specialist at 0.6 rad from the teacher, the student at an angle on the other side."""

    def at(radians):
        radians = torch.tensor(radians)
        return {"layer1": torch.stack([radians.cos(), radians.sin()]).view(1, 2, 1, 1).expand(1, 2, 4, 4)}

    def loss(opacity, weight):
        return specialist_loss(at(0.0), at(0.6), at(-angle), torch.full((1, 1, 16, 16), opacity), weight).item()

    apart = 2 - 2 * math.cos(0.6 + angle)
    lacking = 2 * math.cos(angle) - 2 * math.cos(0.6) if expected is None else expected
    assert loss(0.0, 3.0) == pytest.approx(apart, abs=1e-5)
    assert loss(1.0, 3.0) == pytest.approx(apart + 3 * lacking, abs=1e-5)
    assert loss(1.0, 0.0) == pytest.approx(apart, abs=1e-5)


def test_a_student_that_is_nearest_to_its_specialist_has_less_to_learn():
    teacher, specialist, student = (features(2, seed) for seed in range(3))
    opacity, expected = torch.zeros(2, 1, 32, 32), 0
    for apart in distances(specialist, student):
        weight = torch.where(apart >= apart.flatten().sort().values[-apart.numel() // 4], 1.0, EASY)
        expected = expected + (weight / weight.mean() * apart).mean(dim=(1, 2))
    assert torch.allclose(specialist_loss(teacher, specialist, student, opacity, 3.0, 0.75), expected)
    assert not torch.allclose(specialist_loss(teacher, specialist, student, opacity, 3.0), expected)
