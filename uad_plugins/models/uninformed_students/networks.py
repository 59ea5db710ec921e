"""Patch networks and their dense evaluation (arXiv 1911.02357, section 3.1 and appendix A).

A patch network maps a ``p x p`` patch to one descriptor, with valid convolutions and max-pooling. Evaluated densely it gives
the descriptor of the patch around *every* pixel in one pass: pooling moves by one pixel instead of two, and what follows it
is dilated. With an output stride of 2, 4 or 8 as many poolings keep their stride, and the descriptors are those of every
second, fourth or eighth pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from uad_plugins.models.uninformed_students.grids import STRIDES, Grid

SLOPE = 5e-3
"""Negative slope of every LeakyReLU."""

DIMENSIONS = 128
"""Length of a descriptor."""

Layer = tuple[Literal["conv"], int, int] | tuple[Literal["pool"]]

LAYERS: dict[int, tuple[Layer, ...]] = {
    17: (("conv", 6, 128), ("conv", 5, 256), ("conv", 5, 256), ("conv", 4, 128)),
    33: (("conv", 5, 128), ("pool",), ("conv", 5, 256), ("pool",), ("conv", 2, 256), ("conv", 4, 128)),
    65: (
        ("conv", 5, 128),
        ("pool",),
        ("conv", 5, 128),
        ("pool",),
        ("conv", 5, 128),
        ("pool",),
        ("conv", 4, 256),
        ("conv", 1, 128),
    ),
}
"""Patch size -> layers: kernel size and channels of a convolution, or a max-pooling of 2 with stride 2."""


@dataclass(frozen=True)
class Convolution:
    """One convolution of the dense network.

    Attributes:
        kernel: Side of the kernel in taps.
        dilation: Distance between taps, in pixels of its input.
        stride: Distance between outputs, in pixels of its input.
        pool: How the input is pooled before: ``""`` not, ``stride`` by 2 with stride 2, ``dense`` by 2 with stride 1.
        pool_dilation: Distance between the pixels pooled when ``dense``.
    """

    kernel: int
    dilation: int
    stride: int
    pool: str
    pool_dilation: int


def dense_plan(patch_size: int, stride: int = 1) -> list[Convolution]:
    """Return how each convolution is evaluated for descriptors of every ``stride``-th pixel.

    Poolings keep their stride as long as that loses no wanted output. What stride is left over goes to the last convolution
    with a kernel larger than one: nothing before it can be left out.
    """
    plan: list[Convolution] = []
    dilation, reached, pool, pool_dilation = 1, 1, "", 1
    for layer in LAYERS[patch_size]:
        if layer[0] == "pool":
            if reached < stride:
                pool, reached = "stride", reached * 2
            else:
                pool, pool_dilation = "dense", dilation
                dilation *= 2
            continue
        plan.append(Convolution(layer[1], dilation, 1, pool, pool_dilation))
        pool, pool_dilation = "", 1
    last = max(i for i, step in enumerate(plan) if step.kernel > 1)
    step = plan[last]
    plan[last] = Convolution(step.kernel, step.dilation, stride // reached, step.pool, step.pool_dilation)
    return plan


def receptive_field(patch_size: int) -> int:
    """Return how many rows of the patch a descriptor depends on: poolings round down and may leave out the last ones."""
    field, jump = 1, 1
    for layer in LAYERS[patch_size]:
        if layer[0] == "pool":
            field, jump = field + jump, jump * 2
        else:
            field += (layer[1] - 1) * jump
    return field


class PatchNetwork(nn.Module):
    """One patch network, or several with the same layers that see the same patches and are computed together.

    Several are one grouped convolution a layer: the first sees the image once, each of the others its own group.

    Args:
        patch_size: 17, 33 or 65.
        copies: How many networks.
        width: Channels of the hidden layers as a share of the paper's.
        stride: Output stride of the dense evaluation.

    Shape:
        ``dense``: float32 ``(B, 3, H, W)`` -> ``(B, copies, 128, ceil(H / stride), ceil(W / stride))``.
        ``forward``: patches ``(B, 3, p, p)`` -> ``(B, copies, 128)``.
    """

    def __init__(self, patch_size: int, copies: int = 1, width: float = 1.0, stride: int = 1) -> None:
        super().__init__()
        if patch_size not in LAYERS:
            raise ValueError(f"patch size {patch_size}: one of {sorted(LAYERS)}")
        if stride not in STRIDES:
            raise ValueError(f"output stride {stride}: one of {STRIDES}")
        self.patch_size, self.copies, self.width, self.stride = patch_size, copies, width, stride
        self.convolutions = nn.ModuleList()
        before = 3
        convolutions = [layer for layer in LAYERS[patch_size] if layer[0] == "conv"]
        for position, (_, kernel, channels) in enumerate(convolutions):
            last = position == len(convolutions) - 1
            after = DIMENSIONS if last else max(8, round(channels * width / 8) * 8)
            groups = 1 if position == 0 else copies
            self.convolutions.append(nn.Conv2d(before * groups, after * copies, kernel, groups=groups))
            before = after

    @property
    def _layers(self) -> list[nn.Conv2d]:
        return [layer for layer in self.convolutions if isinstance(layer, nn.Conv2d)]

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the descriptor of each patch."""
        x = patches
        convolutions = iter(self._layers)
        last = self.convolutions[-1]
        for layer in LAYERS[self.patch_size]:
            if layer[0] == "pool":
                x = F.max_pool2d(x, 2)
                continue
            convolution = next(convolutions)
            x = convolution(x)
            if convolution is not last:
                x = F.leaky_relu(x, SLOPE)
        return x.flatten(1).unflatten(1, (self.copies, DIMENSIONS))

    def dense(self, images: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Return the descriptor of the patch around every pixel of a grid; beyond the border images are mirrored.

        Args:
            images: float32 ``(B, 3, H, W)``; ``H`` and ``W`` larger than half a patch.
            grid: None: the one of the network's stride.
        """
        grid = grid or Grid(self.stride)
        x = grid.crop(images, self.patch_size, receptive_field(self.patch_size))
        for convolution, step in zip(self._layers, dense_plan(self.patch_size, grid.stride), strict=True):
            if step.pool == "stride":
                x = F.max_pool2d(x, 2)
            elif step.pool == "dense":
                x = dense_max_pool(x, step.pool_dilation)
            x = F.conv2d(
                x,
                convolution.weight,
                convolution.bias,
                stride=step.stride,
                dilation=step.dilation,
                groups=convolution.groups,
            )
            if convolution is not self.convolutions[-1]:
                x = F.leaky_relu(x, SLOPE)
        return x.unflatten(1, (self.copies, DIMENSIONS))

    def take(self, source: PatchNetwork) -> None:
        """Take the weights of another network of the same shape."""
        self.load_state_dict(source.state_dict())


def dense_max_pool(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """Return the maximum over ``2 x 2`` pixels that lie ``dilation`` apart, at every position.

    Written as maxima of shifted views where they are apart: TensorRT has no dilated pooling.
    """
    if dilation == 1:
        return F.max_pool2d(x, 2, stride=1)
    x = torch.maximum(x[..., :-dilation, :], x[..., dilation:, :])
    return torch.maximum(x[..., :-dilation], x[..., dilation:])


def multiply_accumulates(network: PatchNetwork, size: tuple[int, int]) -> int:
    """Return the multiply-accumulates of the dense evaluation of one image of ``size`` ``(height, width)``."""
    with torch.device("meta"):
        copy = PatchNetwork(network.patch_size, network.copies, network.width, network.stride)
        with FlopCounterMode(display=False) as counter:
            copy.dense(torch.empty(1, 3, *size))
    return int(counter.get_total_flops()) // 2


def patch_networks(modules: nn.ModuleList) -> list[PatchNetwork]:
    """Return the patch networks in a module list."""
    return [module for module in modules if isinstance(module, PatchNetwork)]
