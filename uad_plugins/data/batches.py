"""anomalib's items and batches with the category added, so that it travels with every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.data.dataclasses.numpy.image import NumpyImageBatch, NumpyImageItem


@dataclass
class NumpyUnifiedItem(NumpyImageItem):
    """``NumpyImageItem`` with its category."""

    category: str | None = None
    category_index: Any | None = None


@dataclass
class NumpyUnifiedBatch(NumpyImageBatch):
    """``NumpyImageBatch`` with the category of each image."""

    item_class: ClassVar[type] = NumpyUnifiedItem
    category: list[str] | None = None
    category_index: Any | None = None


@dataclass
class UnifiedItem(ImageItem):
    """``ImageItem`` with its category.

    Attributes:
        category: Name of the product shown.
        category_index: int64 scalar, position of the category in the data set's sorted list.
    """

    numpy_class: ClassVar[type] = NumpyUnifiedItem
    category: str | None = None
    category_index: torch.Tensor | None = None


@dataclass
class UnifiedBatch(ImageBatch):
    """``ImageBatch`` with the category of each image.

    Attributes:
        category: Names, one for each image.
        category_index: int64 ``(B,)``, positions in the data set's sorted list of categories.
    """

    item_class: ClassVar[type] = UnifiedItem
    numpy_class: ClassVar[type] = NumpyUnifiedBatch
    category: list[str] | None = None
    category_index: torch.Tensor | None = None

    @property
    def items(self) -> list[Any]:
        """The batch as a list of items; fields that are None stay None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            self.item_class(**{name: None if value is None else value[i] for name, value in values.items()})
            for i in range(self.batch_size)
        ]

    @classmethod
    def collate(cls, items: Sequence[UnifiedItem]) -> UnifiedBatch:
        """Stack items. The batch has masks only when every item has one: a missing mask must not pass for an empty one."""
        if any(item.image.shape != items[0].image.shape for item in items):
            batch: UnifiedBatch = super().collate(list(items))
            return batch

        def stacked(name: str) -> torch.Tensor | None:
            values = [getattr(item, name) for item in items]
            return None if any(value is None for value in values) else torch.stack([torch.as_tensor(v) for v in values])

        return cls(
            image=torch.stack([item.image.as_subclass(torch.Tensor) for item in items]),
            gt_label=stacked("gt_label"),
            gt_mask=stacked("gt_mask"),
            image_path=[item.image_path for item in items],
            mask_path=[item.mask_path or "" for item in items],
            category=[item.category or "" for item in items],
            category_index=stacked("category_index"),
        )
