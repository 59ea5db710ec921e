"""Equalization of channels between two convolutions, which changes nothing in what a network computes.

The activations of a layer share one scale. Where one channel reaches ten times as far as the others, these are left with a
tenth of the steps. Between two convolutions with nothing but rectifiers and pooling in between, a channel can be made
smaller by the first and larger again by the second (Nagel et al., arXiv 1906.04721, section 4.1). How much of the difference
is moved into the weights, which have a scale for each channel, follows Xiao et al. (arXiv 2211.10438, section 4). Images
decide it: noise drives other channels, and equalized by noise the maps of STFPM were 72 % off instead of 24 %.

Only convolutions without a normalization behind them are touched. Behind one channels are alike already, and those that
calibration hardly saw would be blown up, to be clipped when they are seen: maps of Reverse Distillation were 98 % off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from uad_plugins.quantization.graph import CONV
from uad_plugins.quantization.scope import TorchGraph, watching

HOMOGENEOUS = {
    "relu",
    "relu_",
    "leaky_relu",
    "leaky_relu_",
    "max_pool2d",
    "avg_pool2d",
    "maximum",
    "__getitem__",
}
"""What gives ``s`` times as much where it gets ``s`` times as much, ``s`` positive, and mixes no channels."""

SHARE = 0.5
"""Of the difference between channels, as a power, that moves from the activations into the weights."""

SAMPLES = 64
"""Calibration samples that are looked at; products take turns among them."""

LIMIT = 4.0
"""Most that a channel is scaled by, up or down, for the same reason."""


@dataclass(frozen=True)
class Link:
    """A convolution and those that take nothing but what it gives.

    Attributes:
        producer: The convolution.
        consumers: Convolutions.
    """

    producer: str
    consumers: tuple[str, ...]


class _Peak(nn.Module):
    """Passes a tensor ``(N, C, H, W)`` on and notes the largest magnitude of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = torch.zeros(1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.peak = torch.maximum(self.peak, values.detach().abs().amax(dim=(0, 2, 3)))
        return values


def equalize(core: nn.Module, calibration: Iterable[torch.Tensor]) -> int:
    """Equalize the channels of a network, wherever two convolutions allow it.

    Args:
        core: Float network; its weights are changed, not what it gives.
        calibration: Normalised images, float32 ``(1, 3, H, W)``.

    Returns:
        Number of links equalized.
    """
    images = list(calibration)
    graph = TorchGraph.of(core, images[0])
    found = links(graph)
    peaks = _peaks(core, [link.consumers[0] for link in found], images)
    named = dict(core.named_parameters())
    with torch.no_grad():
        for link, peak in zip(found, peaks, strict=True):
            _scale(graph, named, link, peak)
    return len(found)


def links(graph: TorchGraph) -> list[Link]:
    """Return the places where channels can be scaled."""
    shared = graph.shared()
    convolutions = [name for name in graph.convolutions() if graph.kinds[name] == CONV]
    found = []
    for name in convolutions:
        consumers = _consumers(graph, name)
        touched = [name, *consumers]
        own = {graph.parameters.get(source, "") for each in touched for port, source in graph.inputs[each].items() if port}
        if consumers and set(consumers) <= set(convolutions) and not own & shared:
            found.append(Link(name, tuple(consumers)))
    return found


def _consumers(graph: TorchGraph, producer: str) -> list[str]:
    """Return what takes the producer's channels behind homogeneous operations; none where anything else has a part."""
    reached, waiting, consumers = {producer}, list(graph.outputs[producer]), []
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        if graph.kinds[name] == CONV and graph.inputs[name].get(0) in reached:
            consumers.append(name)
        elif graph.kinds[name] in HOMOGENEOUS:
            waiting.extend(graph.outputs[name])
        else:
            return []
        reached.add(name)
    between = reached - {producer, *consumers}
    if any(source not in reached for name in between for source in graph.inputs[name].values()):
        return []
    return sorted(consumers)


def _peaks(core: nn.Module, places: list[str], images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the largest magnitude of each channel that reaches each of the convolutions."""
    watchers = {place: _Peak() for place in places}
    with watching(core, watchers, inputs=True) as watched:
        for image in images:
            watched(image)
    return [watcher.peak for watcher in watchers.values()]


def _scale(graph: TorchGraph, named: Mapping[str, torch.Tensor], link: Link, peak: torch.Tensor) -> None:
    weights = [named[graph.parameters[graph.inputs[name][1]]] for name in link.consumers]
    reach = torch.stack([_by_input(weight, len(peak)) for weight in weights]).amax(dim=0)
    alive = (peak > 0) & (reach > 0)
    scale = torch.where(alive, peak.clamp(min=1e-12) ** SHARE / reach.clamp(min=1e-12) ** (1 - SHARE), 1.0)
    # As much in all as before: biases and the scales of other layers stay in their order of magnitude.
    scale = torch.where(alive, scale / scale[alive].log().mean().exp(), 1.0).clamp(1 / LIMIT, LIMIT)
    for source in graph.inputs[link.producer].values():
        value = named.get(graph.parameters.get(source, ""))
        # Weight and bias.
        if value is not None:
            value.div_(scale.reshape(-1, *[1] * (value.ndim - 1)))
    for weight in weights:
        groups = len(peak) // weight.shape[1]
        # Each group of outputs sees its own inputs.
        weight.copy_((weight.unflatten(0, (groups, -1)) * scale.reshape(groups, 1, -1, 1, 1)).flatten(0, 1))


def _by_input(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the largest magnitude of a weight ``(O, I / groups, h, w)`` for each of its input channels."""
    return weight.unflatten(0, (channels // weight.shape[1], -1)).abs().amax(dim=(1, 3, 4)).flatten()
