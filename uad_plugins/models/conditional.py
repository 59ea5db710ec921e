"""Conditional batch normalization (de Vries et al., arXiv 1707.00683): one student that knows which product it sees.

What is a flaw of one product may be how another always looks. A student of both that sees no more than the surroundings of a
pixel has to follow its teacher in either. Here the teacher's features of the whole image say which product it is, and that
scales and shifts each channel of the student: all else that it has learnt is shared by the products.

Products may be normalised by mean and variance of their own, too (domain-specific batch normalization, Chang et al., arXiv
1906.03950): those of a batch of several say little of any of them. Once trained this is another scale and shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn
from torch.nn import functional as F

from uad_plugins.errors import UadxError
from uad_plugins.models.descriptors import Groups

OPTION = "model.options.conditional_norm"

EPSILON = 1e-5
"""Added to variances: a channel that is everywhere the same has a gradient, too."""


class Recognised:
    """Which products the images of the current batch show, handed from the teacher to the norms of its student.

    Attributes:
        known: int64 ``(B,)``, while that is known; None: it is recognised.
        in_order: Whether the rows of each product follow one another, once ``groups`` is found: nothing to reorder.
        products: Probabilities, float ``(B, P, 1, 1)``, of the last batch.
    """

    def __init__(self) -> None:
        self.known: torch.Tensor | None = None
        self.products: torch.Tensor | None = None
        self.in_order: bool | None = None
        self._groups: Groups | None = None

    @property
    def groups(self) -> Groups | None:
        """Rows of the batch, int64, by product, while that is known; when first asked for; see ``groups_of``."""
        if self._groups is None and self.known is not None:
            self._groups, self.in_order = groups_of(self.known), bool((self.known.diff() >= 0).all())
        return self._groups

    def tell(self, products: torch.Tensor | None) -> None:
        """Take what is known of the next batch, int64 ``(B,)``; None: nothing."""
        self.known, self._groups, self.in_order = products, None, None

    def __getstate__(self) -> dict[str, None]:
        """Leave the batch behind: its tensors are of no use to a copy."""
        return dict.fromkeys(vars(self))


class RecognisingTeacher(nn.Module):
    """A teacher, and what its features say of the product. To be called before its student.

    Products are told apart by linear discriminant analysis of mean and standard deviation of its channels over the image,
    which hold its style (Huang and Belongie, arXiv 1703.06868): what varies from part to part counts for little, and what
    anomalies change too, where it learns from images that have some.

    Args:
        teacher: Returns features ``(B, C, h, w)`` by layer.
        channels: Of all its layers.
        products: How many are told apart; all are alike until ``learn``.
    """

    def __init__(self, teacher: nn.Module, channels: int, products: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.classifier = nn.Conv2d(2 * channels, products, 1).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(1, 2 * channels, 1, 1))
        self.recognised = Recognised()
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)

    centre: torch.Tensor
    """Of the products: in a lower precision the differences from it keep what the moments themselves would lose."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the teacher's features, and have the products recognised."""
        features: dict[str, torch.Tensor] = self.teacher(images)
        seen, logits = self.recognised, self.classifier(_moments(features) - self.centre)
        seen.products = logits.softmax(dim=1)
        if seen.known is not None:
            seen.products = F.one_hot(seen.known, logits.shape[1]).to(logits)[..., None, None]
        return features

    @contextmanager
    def told(self, products: torch.Tensor) -> Iterator[None]:
        """Tell which products the batch shows, int64 ``(B,)``, in place of what is recognised."""
        self.recognised.tell(products)
        try:
            yield
        finally:
            self.recognised.tell(None)

    @property
    def has_learnt(self) -> bool:
        """Whether products are told apart by now."""
        return bool(self.classifier.weight.any())

    def learn(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Learn to tell products apart, from images of all processes.

        Args:
            batches: Images, float32 ``(B, 3, H, W)``, normalised, and their products, int64 ``(B,)``.

        Raises:
            UadxError: There is no image of a product.
        """
        with torch.no_grad():
            found = [
                (_moments(self.teacher(images)).flatten(1).float().cpu(), products.cpu()) for images, products in batches
            ]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, found)
            found = [batch for share in shares for batch in share]
        features, products = (torch.cat(column) for column in zip(*found, strict=True))
        count = self.classifier.out_channels
        if len(products.unique()) < count:
            raise UadxError(f"{OPTION}: there is a product without a training image", "leave it out with data.categories")
        # Each as likely as any other, however many images of it there are.
        analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[1 / count] * count)
        centre = features.double().mean(dim=0)
        analysis.fit((features - centre).numpy(), products.numpy())
        weight, bias = torch.from_numpy(analysis.coef_), torch.from_numpy(analysis.intercept_)
        if count == 2:
            # Of two products one row says which.
            weight, bias = (torch.cat([-each / 2, each / 2]) for each in (weight, bias))
        self.centre.copy_(centre[:, None, None])
        self.classifier.weight.copy_(weight[..., None, None])
        assert self.classifier.bias is not None
        self.classifier.bias.copy_(bias)


def _moments(features: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return mean and standard deviation of channels ``(B, C, h, w)`` over the image, float ``(B, 2 C, 1, 1)``."""
    moments = []
    for feature in features.values():
        mean = feature.mean(dim=(2, 3), keepdim=True)
        variance = (feature - mean).square().mean(dim=(2, 3), keepdim=True)
        moments += [mean, (variance + EPSILON).sqrt()]
    return torch.cat(moments, dim=1)


class ConditionalNorm(nn.Module):
    """A batch normalization whose result is scaled and shifted by product: at first by one and zero.

    Args:
        norm: The normalization.
        products: How many there are.
        recognised: Which of them are seen.
        own_statistics: Whether products are normalised by mean and variance of their own, until ``settle``.
    """

    def __init__(self, norm: nn.BatchNorm2d, products: int, recognised: Recognised, own_statistics: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.scale, self.shift = (nn.Conv2d(products, norm.num_features, 1, bias=False) for _ in range(2))
        self.recognised = recognised
        for weight in self.scale.weight, self.shift.weight:
            nn.init.zeros_(weight)
        for name, like in ("means", norm.running_mean), ("variances", norm.running_var):
            assert like is not None
            self.register_buffer(name, like.repeat(products, 1) if own_statistics else None)

    means: torch.Tensor | None
    """Running means of products, float32 ``(P, C)``; None: they have those of ``norm``."""

    variances: torch.Tensor | None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Normalise features ``(B, C, h, w)``."""
        seen, products = self.recognised, self.recognised.products
        assert products is not None
        if self.means is not None and self.variances is not None and not (self.training and seen.known is not None):
            # The mean over the products, by no matrix product: autocast would round that.
            shares = products[..., 0].to(self.means)
            affine = self._affine(self.means, self.variances)
            factor, offset = ((shares * each).sum(dim=1)[..., None, None] for each in affine)
            return torch.addcmul(offset, features, factor).to(features.dtype)
        normal = self.norm(features) if self.means is None else self._normalised_apart(features)
        result: torch.Tensor = normal * (1 + self.scale(products)) + self.shift(products)
        return result

    def _affine(self, means: torch.Tensor, variances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what features are multiplied by, and what is added: of each product, ``(P, C)``, as its moments are."""
        scale, shift = (1 + self.scale.weight[..., 0, 0].T).to(means), self.shift.weight[..., 0, 0].T.to(means)
        factor = scale * self.norm.weight * torch.rsqrt(variances + self.norm.eps)
        return factor, scale * self.norm.bias + shift - means * factor

    def _normalised_apart(self, features: torch.Tensor) -> torch.Tensor:
        """Normalise the images of each product by their own mean and variance, and keep running ones."""
        norm, groups = self.norm, self.recognised.groups
        assert groups and self.means is not None and self.variances is not None and norm.momentum is not None
        rows = torch.cat(list(groups.values()))
        if not self.recognised.in_order:
            features = features[rows]
        parts = []
        for product, part in zip(groups, features.split([len(each) for each in groups.values()]), strict=True):
            # A single value is all there is of its mean.
            several, mean, variance = part[:, 0].numel() > 1, self.means[product], self.variances[product]
            parts.append(F.batch_norm(part, mean, variance, norm.weight, norm.bias, several, norm.momentum, norm.eps))
        normal = torch.cat(parts) if len(parts) > 1 else parts[0]
        return normal if self.recognised.in_order else normal[rows.argsort()]

    def settle(self) -> None:
        """Bring the statistics of products into their scale and shift: the result stays as it is in evaluation.

        Left is one normalization, by the statistics of all products, each as often: what a graph has that is deployed.
        """
        if self.means is None or self.variances is None:
            return
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            means, variances = self.means.double(), self.variances.double()
            factor, offset = self._affine(means, variances)
            mean = means.mean(dim=0)
            variance = (variances + means.square()).mean(dim=0) - mean.square()
            # What the norm by itself does, to be made up for.
            usual = norm.weight * torch.rsqrt(variance + norm.eps)
            ratio = torch.where(usual == 0, 1, factor / usual)
            self.scale.weight.copy_((ratio - 1).T[..., None, None])
            self.shift.weight.copy_((offset - ratio * (norm.bias - mean * usual)).T[..., None, None])
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        self.means = self.variances = None


def condition(student: nn.Module, teacher: RecognisingTeacher, *, own_statistics: bool = False) -> None:
    """Make every batch normalization of a student conditional; see ``ConditionalNorm``."""
    products = teacher.classifier.out_channels
    for module in [each for each in student.modules() if not isinstance(each, ConditionalNorm)]:
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, ConditionalNorm(norm, products, teacher.recognised, own_statistics))


def settle(network: nn.Module) -> None:
    """Bring a network into the form in which it is deployed, in place; what it gives in evaluation stays as it is."""
    for module in network.modules():
        if isinstance(module, ConditionalNorm):
            module.settle()


def plain(teacher: Any) -> Any:
    """Return the teacher itself, recognising or not."""
    return teacher.teacher if isinstance(teacher, RecognisingTeacher) else teacher


def groups_of(products: torch.Tensor) -> Groups:
    """Return the rows that show each product, for products int64 ``(B,)``.

    To be called once for a batch: it waits for the device that they lie on.
    """
    return {product: torch.nonzero(products == product)[:, 0] for product in sorted(set(products.tolist()))}


def rows_of(categories: Sequence[str] | None, known: Sequence[str]) -> torch.Tensor:
    """Return the places of categories in those that are told apart, int64 ``(B,)``, on the CPU.

    Raises:
        UadxError: The categories are not given, or one is unknown.
    """
    if not categories:
        raise UadxError(f"{OPTION}: the batch does not say which products it shows", "use UnifiedDataModule")
    unknown = sorted(set(categories) - set(known))
    if unknown:
        raise UadxError(
            f"{OPTION}: the model does not know {', '.join(map(repr, unknown))}", "train a new model on all of them"
        )
    return torch.tensor([list(known).index(name) for name in categories])
