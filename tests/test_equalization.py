"""Equalization makes channels alike and changes nothing in what a network computes."""

from copy import deepcopy

import pytest
import torch
from networks import core, noise
from torch import nn
from torch.nn import functional as F

from uad_plugins.quantization.equalization import equalize, links
from uad_plugins.quantization.scope import TorchGraph

IMAGES = noise(4, seed=5)


def test_nothing_changes_but_weights():
    before, after = core("uninformed_students"), core("uninformed_students")
    assert equalize(after, IMAGES) == 12
    with torch.no_grad():
        for found, expected in zip(after(IMAGES[0]), before(IMAGES[0]), strict=True):
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    pairs = dict(zip(before.state_dict().items(), after.state_dict().values(), strict=True)).items()
    changed = {name for (name, one), other in pairs if not torch.equal(one, other)}
    assert changed
    assert changed <= {name for name, _ in before.named_parameters()}
    # No hook is left, and the network can be quantized and exported.
    assert not any("nncf" in name for name, _ in after.named_modules())


@pytest.mark.parametrize("method", ["stfpm", "reverse_distillation"])
def test_normalized_channels_are_left_alone(method):
    before, after = core(method), core(method)
    assert equalize(after, IMAGES) == 0
    assert all(torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))


class Chain(nn.Module):
    """Two convolutions with what the argument puts between them; the second one in two groups."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 6, 3, groups=2)
        self.between = between

    def forward(self, images):
        return self.second(self.between(self.first(images)))


def shifted(values):
    rectified = F.leaky_relu(values)
    return torch.maximum(rectified[..., :-1], rectified[..., 1:])


ALLOWED = {"relu": F.relu, "pooled": lambda x: F.max_pool2d(F.leaky_relu(x, 0.1), 2), "shifted": shifted}
REFUSED = {
    "sigmoid": torch.sigmoid,
    "skip": lambda x: F.relu(x) + 1,
    "flipped": lambda x: torch.flip(F.relu(x), dims=(1,)),
    "bounded": lambda x: torch.maximum(x, torch.tensor(0.5)),
    "elsewhere": lambda x: torch.maximum(F.relu(x), torch.ones_like(x)),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_channels_become_alike(name):
    torch.manual_seed(0)
    network = Chain(ALLOWED[name]).eval()
    with torch.no_grad():
        network.first.weight.mul_(10.0 ** torch.linspace(-0.5, 0.5, 8).reshape(-1, 1, 1, 1))
        network.first.bias.zero_()
    before = deepcopy(network)
    assert equalize(network, IMAGES) == 1
    with torch.no_grad():
        assert torch.allclose(network(IMAGES[0]), before(IMAGES[0]), rtol=1e-4, atol=1e-4)
        peaks = [each.between(each.first(torch.cat(IMAGES))).abs().amax(dim=(0, 2, 3)) for each in (before, network)]
    assert float(peaks[1].max() / peaks[1].min()) < 0.5 * float(peaks[0].max() / peaks[0].min())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_homogeneous_is_left_alone(name):
    network = Chain(REFUSED[name]).eval()
    assert links(TorchGraph.of(network, IMAGES[0])) == []


class Shared(nn.Module):
    """The same convolution twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.again = nn.Conv2d(4, 4, 3)

    def forward(self, images):
        return self.again(F.relu(self.again(F.relu(self.first(images)))))


def test_weights_that_are_used_twice_are_left_alone():
    assert links(TorchGraph.of(Shared(), IMAGES[0])) == []


def test_a_dead_channel_stays_finite():
    network = Chain(F.relu).eval()
    with torch.no_grad():
        network.first.weight[3], network.first.bias[3] = 0.0, -1.0
        network.second.weight[:3, 1] = 0.0
    before = deepcopy(network)
    equalize(network, IMAGES)
    with torch.no_grad():
        assert torch.allclose(network(IMAGES[0]), before(IMAGES[0]), rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
