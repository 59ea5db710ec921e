"""Anomalies drawn into images of good parts: what a student must not learn to imitate.

A student that has seen several products knows more of its teacher than one that has seen a single one, and follows it into
defects. Shown synthetic ones while training, it learns where to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch.nn import functional as F

from uad_plugins.models.options import FILLINGS, SOFT_EDGES, Filling

LARGEST_BANK, SMALLEST_BANK, BANK_BYTES = 256, 32, 1 << 26
"""How many shapes are made ready at most and at least, and the memory that more than the least may take."""

MIN_OPACITY = 0.25
"""Opacity of the faintest anomaly."""

MIN_CHANGE = 0.03
"""Of RGB in 0..1, most in a pixel's surroundings: less is no anomaly (a flat surface blurred, a white one brightened)."""

COARSE = 16
"""The part of an image's side that blurring takes together, and across which soft edges fade."""

SEED = 0
"""Of the bank: the same for every training, so that a resumed one goes on with it."""


class Material(NamedTuple):
    """What fillings are made of: RGB in 0..1, float ``(B, 3, H, W)``, and float ``(B, 4)`` in 0..1 that say how."""

    noise: torch.Tensor
    parts: torch.Tensor
    others: torch.Tensor
    chances: torch.Tensor


def _discolour(material: Material) -> torch.Tensor:
    """Darken or brighten, by a factor or by an amount."""
    darker, by_factor, much, _ = (chance.view(-1, 1, 1, 1) for chance in material.chances.unbind(1))
    factor = torch.where(darker < 0.5, 0.3 + 0.5 * much, 1.25 + 0.75 * much)
    amount = torch.where(darker < 0.5, -1, 1) * (0.1 + 0.3 * much)
    return torch.where(by_factor < 0.5, material.parts * factor, material.parts + amount).clamp(0, 1)


def _blur(material: Material) -> torch.Tensor:
    cells = [max(1, side // COARSE) for side in material.parts.shape[-2:]]
    return F.interpolate(F.avg_pool2d(material.parts, cells), material.parts.shape[-2:], mode="bilinear")


def _misplace(material: Material) -> torch.Tensor:
    return _moved(material.parts, material.chances)


def _foreign(material: Material) -> torch.Tensor:
    return _moved(material.others, material.chances)


MAKERS: dict[Filling, Callable[[Material], torch.Tensor]] = {
    "noise": lambda material: material.noise,
    "discolour": _discolour,
    "blur": _blur,
    "misplace": _misplace,
    "foreign": _foreign,
}


class SyntheticAnomalies:
    """Draws anomalies into batches of images.

    Shapes, and the noise that may fill them, are those of anomalib's ``PerlinAnomalyGenerator`` (DRAEM, arXiv 2108.07610,
    section 3.3). The other fillings are made of the parts themselves, and edges may fade: pieces of natural images that
    blend in are nearer to real defects than pasted ones (NSA, arXiv 2109.15222). Making a shape takes as long as a training
    step of an image; a bank of them is made once, at the first batch, and each time one is taken it is mirrored, shifted,
    filled and blended anew.

    Args:
        share: Probability that an image gets an anomaly, 0..1.
        fillings: What anomalies are filled with, each with the same probability.
        soft_edges: Probability that the edges of an anomaly fade, 0..1.
    """

    def __init__(self, share: float, fillings: Sequence[Filling] = FILLINGS, soft_edges: float = SOFT_EDGES) -> None:
        self.share = share
        self.fillings = tuple(fillings)
        self.soft_edges = soft_edges
        self._bank: torch.Tensor | None = None

    def draw(
        self, images: torch.Tensor, normalize: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw anomalies into a batch.

        Args:
            images: float32 ``(B, 3, H, W)``, normalised.
            normalize: Turns RGB in 0..1 of this size into what ``images`` are, each channel by a factor and an amount.
            generator: On the CPU; says which images get one, which, where, how opaque, and what it is filled with.

        Returns:
            The images with anomalies, and their opacity, float32 ``(B, 1, H, W)`` in 0..1, 0 where the image is as it was or
            can hardly be told from it.
        """
        if self._bank is None or self._bank.shape[-2:] != images.shape[-2:]:
            self._bank = _bank(*images.shape[-2:])
        self._bank = self._bank.to(images.device)
        chances = torch.rand(len(images), 13, generator=generator)
        which = (chances[:, 0] * len(self._bank)).long()
        taken = _moved(self._bank[which.to(images.device)], chances[:, 1:5]).to(images.dtype) / 255
        noise, shapes = taken[:, :3], taken[:, 3:]
        soft = (chances[:, 5] < self.soft_edges).to(images.device)
        noise[soft], shapes[soft] = _faded(noise[soft], shapes[soft])
        strengths = torch.where(chances[:, 6] < self.share, MIN_OPACITY + (1 - MIN_OPACITY) * chances[:, 7], 0)
        opacity = shapes * strengths.to(images).view(-1, 1, 1, 1)

        black, white = (normalize(torch.full_like(images[:1], value)) for value in (0, 1))
        parts = (images - black) / (white - black)
        filling = self._filled(Material(noise, parts, parts.roll(1, 0), chances[:, 9:].to(images)), chances[:, 8])
        change = opacity * (filling - parts).abs().mean(dim=1, keepdim=True)
        seen = _around(change, F.max_pool2d) >= MIN_CHANGE
        return torch.lerp(images, normalize(filling).to(images.dtype), opacity), opacity * seen

    def _filled(self, material: Material, chances: torch.Tensor) -> torch.Tensor:
        """Return what each anomaly is filled with, for chances ``(B,)`` of one filling or another."""
        kinds, filling = (chances * len(self.fillings)).long().to(material.noise.device), torch.empty_like(material.noise)
        for number, name in enumerate(self.fillings):
            these = kinds == number
            filling[these] = MAKERS[name](Material(*(each[these] for each in material)))
        return filling


def _moved(images: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Shift images ``(B, C, H, W)`` around and mirror them, as ``(B, 4)`` chances have it."""
    places = []
    for shift, mirror, length in zip(chances[:, :2].unbind(1), chances[:, 2:].unbind(1), images.shape[-2:], strict=True):
        at = (torch.arange(length) + (shift.cpu()[:, None] * length).long()) % length
        places.append(torch.where(mirror.cpu()[:, None] < 0.5, length - 1 - at, at).to(images.device))
    each = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[each, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)


def _faded(fillings: torch.Tensor, shapes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the edges of shapes ``(B, 1, H, W)`` fade, and go on with the fillings ``(B, 3, H, W)`` beyond them."""
    mean = partial(F.avg_pool2d, count_include_pad=False)
    faded = _around(shapes, mean)
    return torch.where(shapes > 0, fillings, _around(fillings * shapes, mean) / faded.clamp_min(1e-6)), faded


def _around(images: torch.Tensor, pool: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return the mean or the largest value in each pixel's surroundings, by rows and then by columns, which costs less."""
    reach = int(max(images.shape[-2:])) // (2 * COARSE)
    rows = pool(images, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return pool(rows, (2 * reach + 1, 1), stride=1, padding=(reach, 0))


def _bank(height: int, width: int) -> torch.Tensor:
    """Make shapes: uint8 ``(N, 4, height, width)``, RGB that may fill them, and 0 or 255 for where they are."""
    count = min(LARGEST_BANK, max(SMALLEST_BANK, BANK_BYTES // (4 * height * width)))
    bank, blank = torch.empty(count, 4, height, width, dtype=torch.uint8), torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(SEED)
        generator = PerlinAnomalyGenerator(probability=1.0, blend_factor=1.0)
        for anomaly in bank:
            anomaly.copy_(torch.cat(generator(blank)).clamp(0, 1) * 255)
    return bank
