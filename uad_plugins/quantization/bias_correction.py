"""Sequential bias correction of a network with fake quantizers.

Rounding shifts the mean of what a convolution gives, and the shifts add up from layer to layer. In the order of execution
each convolution's bias takes up the difference of its channels' means to those of the float network, with all corrections
before it in place (Nagel et al., arXiv 1906.04721, section 4.2, measured instead of derived). NNCF does this for OpenVINO's
graphs alone; for torch it has but the kind that looks at each layer by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from uad_plugins.quantization.scope import TorchGraph, watching

BIAS = 2
"""Port of a convolution, and of a normalization, at which its bias comes in."""
BATCH = 8


class _ReachedError(Exception):
    """Ends a call of the network where what it is for has been seen."""


class _Mean(nn.Module):
    """Passes a tensor ``(N, C, H, W)`` on and adds up the mean of each channel.

    Args:
        last: Nothing behind it is needed.
    """

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.total = torch.zeros(1, dtype=torch.float64)
        self.count = 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.total = self.total + values.detach().double().mean(dim=(2, 3)).sum(dim=0)
        self.count += len(values)
        if self.last:
            raise _ReachedError
        return values


def correct_biases(model: nn.Module, reference: nn.Module, graph: TorchGraph, images: Sequence[torch.Tensor]) -> int:
    """Give the convolutions of a quantized network the channel means of the float one.

    Args:
        model: Network with fake quantizers; its biases are changed.
        reference: The float network it was made from.
        graph: Of the float network.
        images: Normalised images, float32 ``(1, 3, H, W)``.

    Returns:
        Number of convolutions corrected: those that have a bias of their own, or a normalization behind them that has.
    """
    batches = [torch.cat(list(images[start : start + BATCH])) for start in range(0, len(images), BATCH)]
    convolutions = set(graph.convolutions())
    places = [graph.normalized(name) for name in graph.kinds if name in convolutions]
    shared = graph.shared()
    biases = {place: graph.parameters.get(graph.inputs[place].get(BIAS, "")) for place in places}
    named = dict(model.named_parameters())
    wanted = [place for place, bias in biases.items() if bias in named and bias not in shared]
    expected = _means(reference, wanted, batches)
    with torch.no_grad():
        for place in wanted:
            named[str(biases[place])].add_((expected[place] - _means(model, [place], batches)[place]).float())
    return len(wanted)


def _means(model: nn.Module, places: list[str], batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the mean of each channel of what the named operations give."""
    watchers = {place: _Mean(last=len(places) == 1) for place in places}
    with watching(model, watchers, inputs=False) as watched:
        for batch in batches:
            try:
                watched(batch)
            except _ReachedError:
                continue
    return {place: watcher.total / watcher.count for place, watcher in watchers.items()}
