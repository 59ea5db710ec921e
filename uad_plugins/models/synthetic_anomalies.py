"""Anomalies drawn into images of good parts: what a student must not learn to imitate.

A student that has seen several products knows more of its teacher than one that has seen a single one, and follows it into
defects. Shown synthetic ones while training, it learns where to stop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator

LARGEST_BANK, SMALLEST_BANK, BANK_BYTES = 256, 32, 1 << 26
"""How many anomalies are made ready at most and at least, and the memory that more than the least may take."""

MIN_OPACITY = 0.25
"""Opacity of the faintest anomaly."""

SEED = 0
"""Of the bank: the same for every training, so that a resumed one goes on with it."""


class SyntheticAnomalies:
    """Draws anomalies into batches of images.

    Shapes and fillings are those of anomalib's ``PerlinAnomalyGenerator`` (DRAEM, arXiv 2108.07610, section 3.3). Making
    one takes as long as a training step of an image; a bank of them is made once, at the first batch, and each time one
    is taken it is mirrored, shifted and blended anew.

    Args:
        share: Probability that an image gets an anomaly, 0..1.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._bank: torch.Tensor | None = None

    def draw(
        self, images: torch.Tensor, normalize: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw anomalies into a batch.

        Args:
            images: float32 ``(B, 3, H, W)``, normalised.
            normalize: Turns RGB in 0..1 of this size into what ``images`` are.
            generator: On the CPU; says which images get one, which, where and how opaque.

        Returns:
            The images with anomalies, and their opacity, float32 ``(B, 1, H, W)`` in 0..1, 0 where the image is as it was.
        """
        height, width = images.shape[-2:]
        if self._bank is None or self._bank.shape[-2:] != (height, width):
            self._bank = _bank(height, width)
        self._bank = self._bank.to(images.device)
        taken, strengths = [], []
        for choice in torch.rand(len(images), 6, generator=generator).tolist():
            anomaly = self._bank[int(choice[0] * len(self._bank))]
            mirrored = [axis for axis, side in ((-2, choice[1]), (-1, choice[2])) if side < 0.5]
            shift = (int(choice[3] * height), int(choice[4] * width))
            taken.append(anomaly.flip(mirrored).roll(shift, (-2, -1)))
            chosen = choice[5] < self.share
            strengths.append(MIN_OPACITY + (1 - MIN_OPACITY) * choice[5] / self.share if chosen else 0.0)
        drawn = torch.stack(taken).to(images.dtype) / 255
        opacity = drawn[:, 3:] * torch.tensor(strengths, device=images.device, dtype=images.dtype).view(-1, 1, 1, 1)
        return torch.lerp(images, normalize(drawn[:, :3]).to(images.dtype), opacity), opacity


def _bank(height: int, width: int) -> torch.Tensor:
    """Make anomalies: uint8 ``(N, 4, height, width)``, their RGB and their mask, 0 or 255."""
    count = min(LARGEST_BANK, max(SMALLEST_BANK, BANK_BYTES // (4 * height * width)))
    bank, blank = torch.empty(count, 4, height, width, dtype=torch.uint8), torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(SEED)
        generator = PerlinAnomalyGenerator(probability=1.0, blend_factor=1.0)
        for anomaly in bank:
            anomaly.copy_(torch.cat(generator(blank)).clamp(0, 1) * 255)
    return bank
