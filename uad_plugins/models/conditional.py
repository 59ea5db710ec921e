"""Conditional batch normalization (de Vries et al., arXiv 1707.00683): one student that knows which product it sees.

What is a flaw of one product may be how another always looks. A student of both that sees no more than the surroundings of a
pixel has to follow its teacher in either. Here the teacher's features of the whole image say which product it is, and that
scales and shifts each channel of the student: all else that it has learnt is shared by the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from uad_plugins.errors import UadxError

OPTION = "model.options.conditional_norm"


class Recognised:
    """Which products the images of the current batch show, handed from the teacher to the norms of its student.

    Attributes:
        known: int64 ``(B,)``, while that is known; None: it is recognised.
        logits: float ``(B, P, 1, 1)``, of the last batch.
        products: Probabilities, float ``(B, P, 1, 1)``: of the last batch.
    """

    def __init__(self) -> None:
        self.known: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self.products: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        """Leave the batch behind: its tensors are of no use to a copy, and those with a gradient cannot be copied."""
        return dict.fromkeys(vars(self))


class RecognisingTeacher(nn.Module):
    """A teacher, and what its features say of the product. To be called before its student.

    Args:
        teacher: Returns features ``(B, C, h, w)`` by layer.
        channels: Of the last of its layers.
        products: How many are told apart.
    """

    def __init__(self, teacher: nn.Module, channels: int, products: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.classifier = nn.Conv2d(channels, products, 1)
        self.recognised = Recognised()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the teacher's features, and have the products recognised."""
        features: dict[str, torch.Tensor] = self.teacher(images)
        last = list(features.values())[-1]
        seen, logits = self.recognised, self.classifier(F.normalize(last.mean(dim=(2, 3), keepdim=True)))
        seen.logits, seen.products = logits, logits.detach().softmax(dim=1)
        if seen.known is not None:
            seen.products = F.one_hot(seen.known, logits.shape[1]).to(logits)[..., None, None]
        return features

    @contextmanager
    def told(self, products: torch.Tensor) -> Iterator[None]:
        """Tell which products the batch shows, int64 ``(B,)``, in place of what is recognised."""
        self.recognised.known = products
        try:
            yield
        finally:
            self.recognised.known = None

    def loss(self, products: torch.Tensor) -> torch.Tensor:
        """Return the scalar cross entropy of what was recognised in the last batch, which shows products int64 ``(B,)``."""
        assert self.recognised.logits is not None
        return F.cross_entropy(self.recognised.logits.flatten(1).float(), products)


class ConditionalNorm(nn.Module):
    """A batch normalization whose result is scaled and shifted by product: at first by one and zero.

    Args:
        norm: The normalization.
        products: How many there are.
        recognised: Which of them are seen.
    """

    def __init__(self, norm: nn.BatchNorm2d, products: int, recognised: Recognised) -> None:
        super().__init__()
        self.norm = norm
        self.scale, self.shift = (nn.Conv2d(products, norm.num_features, 1, bias=False) for _ in range(2))
        self.recognised = recognised
        for weight in self.scale.weight, self.shift.weight:
            nn.init.zeros_(weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Normalise features ``(B, C, h, w)``."""
        products = self.recognised.products
        assert products is not None
        result: torch.Tensor = self.norm(features) * (1 + self.scale(products)) + self.shift(products)
        return result


def condition(student: nn.Module, teacher: RecognisingTeacher) -> None:
    """Make every batch normalization of a student conditional."""
    products = teacher.classifier.out_channels
    for module in [each for each in student.modules() if not isinstance(each, ConditionalNorm)]:
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, ConditionalNorm(norm, products, teacher.recognised))


def plain(teacher: Any) -> Any:
    """Return the teacher itself, recognising or not."""
    return teacher.teacher if isinstance(teacher, RecognisingTeacher) else teacher


def rows_of(categories: Sequence[str] | None, known: Sequence[str]) -> torch.Tensor:
    """Return the places of categories in those that are told apart, int64 ``(B,)``, on the CPU.

    Raises:
        UadxError: The categories are not given, or one is unknown.
    """
    if not categories:
        raise UadxError(f"{OPTION}: the batch does not say which products it shows", "use UnifiedDataModule")
    unknown = sorted(set(categories) - set(known))
    if unknown:
        raise UadxError(f"{OPTION}: the model does not know {', '.join(map(repr, unknown))}", "train it on them too")
    return torch.tensor([list(known).index(name) for name in categories])
