"""Calibration images that drive a network's activations far beyond what all others do.

The range of an activation has to hold the strongest responses of good parts. One odd image among hundreds (an empty picture,
another part) can reach ten or thirty times as far in the deep layers of a decoder, and would leave all others a tenth of the
steps: ten of 300 pictures took the maps of Reverse Distillation 33 % off instead of 3 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from uad_plugins.data.samples import SampleTable
from uad_plugins.quantization.calibration import Calibration
from uad_plugins.quantization.scope import TorchGraph, watching

TYPICAL = 0.95
"""Share of the samples that say how far activations reach."""

FACTOR = 2.0
"""What reaches this many times as far is left out."""

OUTERMOST = 1e-3
"""Share of a sample's values at a convolution that its reach does not count."""


class _Reach(nn.Module):
    """Passes a tensor on and notes how far the magnitudes of its values reach."""

    def __init__(self) -> None:
        super().__init__()
        self.reach = 0.0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        magnitudes = values.detach().abs().flatten()
        self.reach = float(magnitudes.topk(max(1, int(OUTERMOST * magnitudes.numel()))).values[-1])
        return values


def without_outliers(core: nn.Module, calibration: Calibration, table: SampleTable) -> Calibration:
    """Leave out the images that drive some convolution's input more than ``FACTOR`` times as far as ``TYPICAL`` samples do.

    It takes about twenty samples for any to be left out. Of no category more than half of the images are: then it is not
    the images that are odd.

    Args:
        core: Float network; not changed.
        calibration: What is looked at.
        table: Where its images come from, with their categories.

    Returns:
        The rest; ``left_out`` in its record names the others relative to the table's root.
    """
    if not calibration.paths:
        return calibration
    images = (torch.from_numpy(calibration.image(path)) for path in calibration.paths)
    reaches = _reaches(core, torch.zeros(1, 3, *calibration.image_size), images)
    found = {calibration.paths[index] for index in outlying(reaches)}
    if not found:
        return calibration
    odd = {sample.path: sample.category for sample in table if sample.path in found}
    share = Counter(odd.values())
    taken = calibration.record["images"]
    return calibration.without({path: name for path, name in odd.items() if 2 * share[name] <= taken[name]}, table.root)


def outlying(reaches: NDArray[np.float64]) -> list[int]:
    """Return the samples that reach too far anywhere.

    Args:
        reaches: Of each sample at each place, ``(samples, places)``, not negative.
    """
    limits = FACTOR * np.quantile(reaches, TYPICAL, axis=0)
    return [int(index) for index in np.flatnonzero((reaches > limits).any(axis=1))]


def _reaches(core: nn.Module, example: torch.Tensor, images: Iterable[torch.Tensor]) -> NDArray[np.float64]:
    """Return how far each image drives the input of each convolution, float64 ``(images, convolutions)``."""
    watchers = {place: _Reach() for place in TorchGraph.of(core, example).convolutions()}
    found = []
    with watching(core, watchers, inputs=True) as watched:
        for image in images:
            watched(image)
            found.append([watcher.reach for watcher in watchers.values()])
    return np.array(found)
