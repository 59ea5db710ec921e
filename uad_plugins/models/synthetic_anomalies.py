"""Anomalies drawn into images of good parts: what a student must not learn to imitate.

A student that has seen several products knows more of its teacher than one that has seen a single one, and follows it into
defects. Shown synthetic ones while training, it learns where to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch.nn import functional as F

from uad_plugins.errors import UsageError
from uad_plugins.models.descriptors import Groups
from uad_plugins.models.options import FILLINGS, SOFT_EDGES, Filling

LARGEST_BANK, SMALLEST_BANK, BANK_BYTES = 256, 32, 1 << 26
"""How many shapes are made ready at most and at least, and the memory that more than the least may take."""

MIN_OPACITY = 0.25
"""Opacity of the faintest anomaly, before its edges fade."""

MIN_CHANGE = 0.03
"""Smallest change of RGB in 0..1 that counts: mean of the channels, after blending, the largest in a pixel's surroundings.

A white board made brighter is no anomaly, nor is a smooth surface blurred.
"""

COARSE = 16
"""The part of an image's side that blurring takes together, and across which soft edges fade."""

SEED = 0
"""Of the bank: the same for every training, so that a resumed one goes on with it."""


class Material(NamedTuple):
    """What fillings are made of.

    Attributes:
        parts: The images to draw into, RGB in 0..1, float ``(B, 3, H, W)``.
        others: Other images of the batch, where it has more than one; as ``parts``.
        shapes: From the bank, uint8 ``(B, 4, H, W)``: noise and mask.
        places: float ``(B, 4)``, 0..1, on the CPU: how the shapes are moved; see ``_moved``.
        chances: float ``(B, 4)``, 0..1, on the CPU: how the filling is made.
    """

    parts: torch.Tensor
    others: torch.Tensor
    shapes: torch.Tensor
    places: torch.Tensor
    chances: torch.Tensor

    def at(self, rows: torch.Tensor) -> Material:
        """Return that of some images, for int64 ``(N,)`` on the CPU."""
        return Material(*(each[rows.to(each.device)] for each in self))


def _noise(material: Material) -> torch.Tensor:
    """Noise of anomalib's, going on beyond the shape that it lies in."""
    moved = _moved(material.shapes, material.places).to(material.parts.dtype) / 255
    noise, shapes = moved[:, :3], moved[:, 3:]
    return torch.where(shapes > 0, noise, _around(noise * shapes) / _around(shapes).clamp_min(1e-6))


def _discolour(material: Material) -> torch.Tensor:
    """Darken or brighten, by a factor or by an amount."""
    darker, by_factor, much, _ = (chance.view(-1, 1, 1, 1) for chance in material.chances.to(material.parts).unbind(1))
    factor = torch.where(darker < 0.5, 0.3 + 0.5 * much, 1.25 + 0.75 * much)
    amount = torch.where(darker < 0.5, -1, 1) * (0.1 + 0.3 * much)
    return torch.where(by_factor < 0.5, material.parts * factor, material.parts + amount).clamp(0, 1)


def _blur(material: Material) -> torch.Tensor:
    height, width = (side // max(1, side // COARSE) for side in material.parts.shape[-2:])
    cells = F.adaptive_avg_pool2d(material.parts, (height, width))
    return F.interpolate(cells, material.parts.shape[-2:], mode="bilinear")


def _misplace(material: Material) -> torch.Tensor:
    return _moved(material.parts, material.chances)


def _foreign(material: Material) -> torch.Tensor:
    return _moved(material.others, material.chances)


MAKERS: dict[Filling, Callable[[Material], torch.Tensor]] = {
    "noise": _noise,
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
        self,
        images: torch.Tensor,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        generator: torch.Generator,
        groups: Groups | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw anomalies into a batch.

        Args:
            images: float ``(B, 3, H, W)``, normalised.
            normalize: Turns RGB in 0..1 of this size into what ``images`` are, each channel by a factor and an amount.
            generator: On the CPU; says which images get one, which, where, how opaque, and what it is filled with.
            groups: Rows of the batch, int64, by product: pieces of other images are then those of the same; None: of any.

        Returns:
            The images with anomalies, and their opacity, float ``(B, 1, H, W)`` in 0..1, 0 where the image is as it was or
            can hardly be told from it.

        Raises:
            UsageError: The images were normalised by something else than a factor and an amount.
        """
        black, white = (normalize(torch.full_like(images[:1], value)) for value in (0, 1))
        if self._bank is None or self._bank.shape[-2:] != images.shape[-2:]:
            self._bank = _bank(*images.shape[-2:])
            if not (1 / (white - black)).isfinite().all():
                raise UsageError("synthetic anomalies: the pre-processor does more than scale channels", "use Normalize")
        self._bank = self._bank.to(images.device)
        chances = torch.rand(len(images), 13, generator=generator)
        chosen = torch.nonzero(chances[:, 6] < self.share)[:, 0]
        which, places, soft, _, strength, kind, how = chances[chosen].split([1, 4, 1, 1, 1, 1, 4], dim=1)
        drawn, opacities, rows = images.clone(), torch.zeros_like(images[:, :1]), chosen.to(images.device)
        if len(rows):
            others = _before(len(images), groups, images.device)[rows]
            parts, others = ((images[these] - black) / (white - black) for these in (rows, others))
            shapes = self._bank[(which[:, 0] * len(self._bank)).long().to(images.device)]
            material = Material(parts, others, shapes, places, how)
            opacity, filling = self._opacity(material, soft[:, 0], strength), self._filling(material, kind[:, 0])
            drawn[rows] = torch.lerp(images[rows], normalize(filling).to(images.dtype), opacity)
            change = opacity * (filling - parts).abs().mean(dim=1, keepdim=True)
            opacities[rows] = opacity * (_around((change >= MIN_CHANGE).to(change)) > 0)
        return drawn, opacities

    def _opacity(self, material: Material, chances: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        """Return how opaque anomalies are, for chances ``(B,)`` of edges that fade, and strengths ``(B, 1)``."""
        shapes = _moved(material.shapes[:, 3:], material.places).to(material.parts.dtype) / 255
        soft = torch.nonzero(chances < self.soft_edges)[:, 0].to(shapes.device)
        shapes[soft] = _around(shapes[soft])
        return shapes * (MIN_OPACITY + (1 - MIN_OPACITY) * strengths).to(shapes)[..., None, None]

    def _filling(self, material: Material, chances: torch.Tensor) -> torch.Tensor:
        """Return what each anomaly is filled with, RGB in 0..1, for chances ``(B,)`` of one filling or another."""
        kinds, filling = (chances * len(self.fillings)).long(), torch.empty_like(material.parts)
        for number, name in enumerate(self.fillings):
            rows = torch.nonzero(kinds == number)[:, 0]
            if len(rows):
                filling[rows.to(filling.device)] = MAKERS[name](material.at(rows))
        return filling


def _before(count: int, groups: Groups | None, device: torch.device) -> torch.Tensor:
    """Return the row before each, int64 ``(count,)``, of those of the same group; before the first is the last."""
    before = torch.arange(-1, count - 1, device=device) % count
    for rows in groups.values() if groups else ():
        before[rows] = rows.roll(1)
    return before


def _moved(images: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Shift images ``(B, C, H, W)`` around and mirror them, as ``(B, 4)`` chances on the CPU have it."""
    places = []
    for shift, mirror, length in zip(chances[:, :2].unbind(1), chances[:, 2:].unbind(1), images.shape[-2:], strict=True):
        at = (torch.arange(length) + (shift[:, None] * length).long()) % length
        places.append(torch.where(mirror[:, None] < 0.5, length - 1 - at, at).to(images.device))
    each = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[each, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)


def _around(images: torch.Tensor) -> torch.Tensor:
    """Return the mean of what is around each pixel, for images ``(B, C, H, W)``.

    By a matrix for the rows and one for the columns, in a sixth of the time that pooling takes on a CPU.
    """
    reach = int(max(images.shape[-2:])) // (2 * COARSE)
    rows, columns = (_neighbours(length, reach).to(images) for length in images.shape[-2:])
    with torch.autocast(images.device.type, enabled=False):
        return rows @ (images @ columns.T)


def _neighbours(length: int, reach: int) -> torch.Tensor:
    """Return weights ``(length, length)`` that take the mean of the neighbours at most so far away, cut off at the ends."""
    places = torch.arange(length)
    near = ((places[:, None] - places).abs() <= reach).float()
    return near / near.sum(dim=1, keepdim=True)


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
