"""Students of single products, from which the student of all of them learns instead of from the teacher.

One that knows a single product fails where it should; one that learns several from their teacher learns more of it. Taught
by the first, on images with synthetic anomalies, the second learns where to fail, too. Of several of one product it learns
their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uad_plugins.artifacts import MANIFEST, Run
from uad_plugins.data.samples import from_category
from uad_plugins.errors import UadxError
from uad_plugins.models.torch_detector import TorchDetector

HOW = "train one on each product, with the same model, weights and image size, into one folder; see docs/training.md"

Parts = tuple[nn.Module, nn.Module]
"""Teacher and student of a network."""


class Specialists:
    """The students of each product.

    Args:
        students: By product, one or several. They are frozen.
        origins: SHA-256 of the checkpoint of each.
        held_out: What each was not trained on, from the product's folder on; None: it does not say.
    """

    def __init__(
        self,
        students: Mapping[str, Sequence[nn.Module]],
        origins: Mapping[str, Sequence[str]] | None = None,
        held_out: Mapping[str, Sequence[Set[str] | None]] | None = None,
    ) -> None:
        self.students = {
            name: [student.eval().requires_grad_(False).to(memory_format=torch.channels_last) for student in several]
            for name, several in students.items()
        }
        self.origins = {name: list(several) for name, several in (origins or {}).items()}
        self.held_out = {name: list(several) for name, several in (held_out or {}).items()}
        self._place: tuple[torch.device, torch.dtype, torch.dtype] | None = None

    @classmethod
    def load(cls, folder: Path, model: Any, parts: Callable[[Any], Parts], *, compare: bool) -> Specialists:
        """Load the students of the finished runs that lie in a folder.

        Args:
            folder: With a run in each folder below it; hidden ones are left out.
            model: The anomalib module that is to be taught.
            parts: Returns teacher and student of ``model.model``.
            compare: Whether the teacher of ``model`` has its weights by now, so that it can be compared with theirs.

        Raises:
            UadxError: There are none, one cannot be used for this model, or two are the same.
        """
        folder = folder.expanduser()
        if not folder.is_dir():
            raise UadxError(f"model.options.specialists: {folder}: no such folder", HOW)
        students: dict[str, list[nn.Module]] = {}
        origins: dict[str, list[str]] = {}
        held_out: dict[str, list[Set[str] | None]] = {}
        places: dict[str, Path] = {}
        for place in sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}")):
            run, network = Run(place), _network(place, model, parts, compare=compare)
            origin = run.checkpoint_sha256()
            if origin in places:
                raise UadxError(
                    f"model.options.specialists: {place} and {places[origin]} are the same",
                    "move one of them out of the folder",
                )
            places[origin] = place
            for category in run.manifest().categories:
                students.setdefault(category, []).append(parts(network)[1])
                origins.setdefault(category, []).append(origin)
                theirs = run.held_out()
                names = None if theirs is None else {from_category(name, category) for name in theirs}
                held_out.setdefault(category, []).append(names)
        if not students:
            raise UadxError(f"model.options.specialists: {folder}: there is no run in it", HOW)
        return cls(students, origins, held_out)

    def require(self, categories: Iterable[str]) -> None:
        """Check that each product has one.

        Raises:
            UadxError: One has none; the message has its name.
        """
        missing = sorted(set(categories) - self.students.keys())
        if missing:
            raise UadxError(f"model.options.specialists: there is none for {', '.join(map(repr, missing))}", HOW)

    def have_seen(self, category: str, held_out: Set[str], others: Set[str]) -> Set[str]:
        """Return which of a product's held-out images a specialist was trained on.

        Args:
            category: The product.
            held_out: Images held out now, from the product's folder on (``from_category``).
            others: All other images of good parts: where a specialist held out none of either, it was trained on other data.
        """
        theirs = [each for each in self.held_out.get(category, ()) if each and each & (held_out | others)]
        return set().union(*(held_out - each for each in theirs))

    def teach(
        self,
        categories: Sequence[str] | None,
        like: torch.Tensor,
        ask: Callable[[nn.Module, torch.Tensor], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Have each image seen by the students of its product.

        Args:
            categories: Products of the images, ``B`` of them.
            like: Of the device and the dtype that the students have to be of.
            ask: Gets a student and int64 ``(N,)``, the places in the batch of the images to show to it; returns features
                ``(N, C, h, w)`` by layer, scaled so that those of several students can be averaged.

        Returns:
            Features ``(B, C, h, w)`` by layer, the mean over the students of the product, without gradient.

        Raises:
            UadxError: Categories are not known, or one has no student.
        """
        if not categories:
            raise UadxError("specialists: the batch does not say which products it shows", "use UnifiedDataModule")
        self.require(categories)
        self._move(like)
        every: list[torch.Tensor] = []
        with torch.no_grad():
            for name in sorted(set(categories)):
                rows = torch.tensor([row for row, each in enumerate(categories) if each == name], device=like.device)
                answers = [ask(student, rows) for student in self.students[name]]
                seen = [torch.stack(layer).mean(dim=0) for layer in zip(*answers, strict=True)]
                every = every or [feature.new_empty(len(categories), *feature.shape[1:]) for feature in seen]
                for whole, feature in zip(every, seen, strict=True):
                    whole[rows] = feature
        return every

    def _move(self, like: torch.Tensor) -> None:
        """Bring them to a device and a dtype: convolutions to that of autocast, which would convert them at each call.

        What a lower precision has rounded stays so; a training keeps to one.
        """
        kind = like.device.type
        lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        if self._place == (like.device, like.dtype, lower):
            return
        for student in chain.from_iterable(self.students.values()):
            student.to(like)
            for module in student.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    module.to(lower)
        self._place = (like.device, like.dtype, lower)


def _network(place: Path, model: Any, parts: Callable[[Any], Parts], *, compare: bool) -> Any:
    """Load the network of a run, and refuse one whose student cannot teach that of a model."""
    detector = TorchDetector.open(place, device="cpu")
    other, wrong = detector.model, None
    if type(other) is not type(model):
        wrong = f"was trained with {Run(place).manifest().model}"
    elif _layers(other) != _layers(model):
        wrong = f"has {_layers(other)}"
    elif model.input_size is not None and tuple(model.input_size) != detector.image_size:
        wrong = f"was trained at {'x'.join(map(str, detector.image_size))} pixels"
    elif compare and not _same(parts(other.model)[0], parts(model.model)[0]):
        wrong = "has a teacher with other weights"
    if other.products:
        raise UadxError(
            f"model.options.specialists: {place} is told its products by its own teacher, and cannot teach another",
            "train one on each product, or without model.options.conditional_norm",
        )
    if wrong:
        raise UadxError(f"model.options.specialists: {place} {wrong}, unlike the model that is to be trained", HOW)
    return other.model


def _layers(model: Any) -> str:
    return f"{', '.join(model.hparams['layers'])} of {model.hparams['backbone']}"


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
