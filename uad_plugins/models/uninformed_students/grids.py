"""Which pixels of an image get a descriptor, and the border that their patches see beyond the image."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd

import torch
from torch.nn import functional as F

STRIDES = (1, 2, 4, 8)
"""Output strides."""


@dataclass(frozen=True)
class Grid:
    """A regular grid of pixels, or a window of it.

    Attributes:
        stride: Every how manieth pixel, of ``STRIDES``.
        offset: Row and column of the first pixel, each below the stride; None: the pixel in the middle,
            ``(stride - 1) // 2``, so that enlarging the outputs by the stride shifts them by half a pixel at most.
        window: ``(top, left, height, width)`` of the part that is computed, in pixels of the grid; None: all of it.
    """

    stride: int = 1
    offset: tuple[int, int] | None = None
    window: tuple[int, int, int, int] | None = None

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the whole grid in an image of ``size`` ``(height, width)``."""
        return (-(-size[0] // self.stride), -(-size[1] // self.stride))

    def crop(self, images: torch.Tensor, patch_size: int, field: int) -> torch.Tensor:
        """Return what the patches of the grid cover; beyond the border images are mirrored.

        Args:
            images: float32 ``(B, 3, H, W)``; ``H`` and ``W`` larger than half a patch.
            patch_size: Side of a patch.
            field: How many of its rows a descriptor depends on.
        """
        size = (int(images.shape[-2]), int(images.shape[-1]))
        middle = (self.stride - 1) // 2
        first = self.offset or (middle, middle)
        top, left, *window = self.window or (0, 0, *self.shape(size))
        sides: list[int] = []
        for length, begin, number, cells in zip(size, (top, left), first, window, strict=True):
            before = patch_size // 2 - number - begin * self.stride
            after = (cells - 1) * self.stride + field - length - before
            sides = [before, after, *sides]
        return mirror_pad(images, (sides[0], sides[1], sides[2], sides[3]))


def grid_of_step(step: int, size: tuple[int, int], stride: int = 1, side: int | None = None) -> Grid:
    """Return what a training step is trained on, such that every pixel has its turn.

    It depends on the step alone, so that a resumed training goes on as an unbroken one.

    Args:
        step: Number of the step.
        size: ``(height, width)`` of the images.
        stride: Output stride.
        side: Side of a square window in pixels of the image; None: the whole image.
    """
    rows, columns = Grid(stride).shape(size)
    cells = (rows, columns) if side is None else (min(rows, ceil(side / stride)), min(columns, ceil(side / stride)))
    tiles = (ceil(rows / cells[0]), ceil(columns / cells[1]))
    turns = stride**2 * tiles[0] * tiles[1]
    # About the golden section of all turns: any few steps are spread over them. Coprime to their number: each comes once.
    pace = next(pace for pace in range(ceil(0.618 * turns), 2 * turns) if gcd(pace, turns) == 1)
    turn, offset = divmod(step * pace % turns, stride**2)
    offset_of = divmod(offset, stride)
    if side is None:
        return Grid(stride, offset_of)
    down, right = divmod(turn, tiles[1])
    # The last window of a row or column is moved back into the image.
    top, left = min(down * cells[0], rows - cells[0]), min(right * cells[1], columns - cells[1])
    return Grid(stride, offset_of, (top, left, *cells))


def mirror_pad(images: torch.Tensor, pad: tuple[int, int, int, int]) -> torch.Tensor:
    """Pad ``(left, right, top, bottom)`` by mirroring; negative values crop."""
    left, right, top, bottom = pad
    grown = F.pad(images, tuple(max(0, side) for side in pad), mode="reflect")
    rows = slice(max(0, -top), grown.shape[-2] - max(0, -bottom))
    columns = slice(max(0, -left), grown.shape[-1] - max(0, -right))
    return grown[..., rows, columns]
