"""The unified datamodule: many categories, one model, three disjoint parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.utils.attrs import get_nested_attr
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize, Transform
from torchvision.tv_tensors import Image, Mask

from uad_plugins.cpu import cores
from uad_plugins.data.batches import UnifiedBatch, UnifiedItem
from uad_plugins.data.check import require_readable
from uad_plugins.data.layouts import scan
from uad_plugins.data.pixel_cache import PixelCache
from uad_plugins.data.samples import NORMAL, SampleTable, hold_out, require_parts, trained_categories
from uad_plugins.data.sampling import NATURAL, CategorySampler, GroupedBatchSampler, ShareSampler
from uad_plugins.errors import UadxError
from uad_plugins.imaging import RgbImage, read_mask, read_rgb, resize_mask, resize_rgb
from uad_plugins.progress import Progress


class UnifiedDataset(AnomalibDataset):
    """Images of many categories at one size, decoded when asked for.

    Args:
        table: All samples of the data set.
        indices: Which of them belong to this part.
        image_size: ``(height, width)`` that images and masks are resized to.
        masks: Read ground-truth masks (normal images then get empty ones).
        augmentations: Applied to image and mask after resizing.
        cache: Where the images lie decoded, or None.
        cache_rows: int64 ``(len(indices),)``, the row of each in the cache.
    """

    def __init__(
        self,
        table: SampleTable,
        indices: NDArray[np.int64],
        image_size: tuple[int, int],
        *,
        masks: bool,
        augmentations: Transform | None = None,
        cache: PixelCache | None = None,
        cache_rows: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self.cache = cache
        self.cache_rows = cache_rows
        self.table = table
        self.indices = indices
        self.image_size = image_size
        masked = set(table.masked_categories()) if masks else set()
        self._masked = np.array([name in masked for name in table.categories], dtype=bool)

    def __len__(self) -> int:
        return len(self.indices)

    def has_ground_truth(self) -> NDArray[np.bool_]:
        """Return for each sample whether it comes with a mask: its own, or the empty one of a normal image.

        Normal images count only in categories that have masks at all: elsewhere nothing is known of pixels.
        """
        table = self.table
        usable = table.has_mask[self.indices] | (table.labels[self.indices] == NORMAL)
        return usable & self._masked[table.category_index[self.indices]]

    @property
    def samples(self) -> Any:
        """The samples as anomalib's DataFrame, made when asked for."""
        from pandas import DataFrame

        rows = [self.table[int(index)] for index in self.indices]
        frame = DataFrame(
            {
                "image_path": [row.path for row in rows],
                "label": [row.defect for row in rows],
                "label_index": [row.label for row in rows],
                "mask_path": [row.mask for row in rows],
                "split": [row.split for row in rows],
                "category": [row.category for row in rows],
            }
        )
        frame.attrs["task"] = self.task.value
        return frame

    @samples.setter
    def samples(self, samples: Any) -> None:
        raise AttributeError("the samples of a UnifiedDataset come from its table")

    @property
    def task(self) -> TaskType:
        """Segmentation when any category of this part has masks, else classification."""
        return TaskType.SEGMENTATION if bool(self._masked.any()) else TaskType.CLASSIFICATION

    @property
    def has_normal(self) -> bool:
        """Whether there are normal samples."""
        return bool((self.table.labels[self.indices] == NORMAL).any())

    @property
    def has_anomalous(self) -> bool:
        """Whether there are anomalous samples."""
        return bool((self.table.labels[self.indices] != NORMAL).any())

    def subsample(self, indices: Sequence[int], inplace: bool = False) -> UnifiedDataset:
        """Return the part with only the samples at the given positions."""
        if len(set(indices)) != len(indices):
            raise ValueError("No duplicates allowed in indices.")
        chosen = self.indices[np.asarray(indices, dtype=np.int64)]
        rows = self.cache_rows[np.asarray(indices, dtype=np.int64)] if self.cache_rows is not None else None
        if inplace:
            self.indices, self.cache_rows = chosen, rows
            return self
        return UnifiedDataset(
            self.table,
            chosen,
            self.image_size,
            masks=bool(self._masked.any()),
            augmentations=self.augmentations,
            cache=self.cache,
            cache_rows=rows,
        )

    def _pixels(self, index: int, path: str) -> RgbImage:
        if self.cache is not None and self.cache_rows is not None:
            return self.cache.read(int(self.cache_rows[index]))
        return np.array(resize_rgb(read_rgb(path), self.image_size))

    def __getitem__(self, index: int) -> UnifiedItem:
        sample = self.table[int(self.indices[index])]
        category_index = int(self.table.category_index[self.indices[index]])
        image = Image(torch.from_numpy(self._pixels(index, sample.path)).permute(2, 0, 1))
        mask: Mask | None = None
        if self._masked[category_index] and (sample.mask or sample.label == NORMAL):
            truth = resize_mask(read_mask(sample.mask), self.image_size) if sample.mask else np.zeros(self.image_size, bool)
            mask = Mask(torch.from_numpy(truth.astype(np.uint8)))
        if self.augmentations is not None:
            image, mask = self.augmentations(image, mask) if mask is not None else (self.augmentations(image), None)
        return UnifiedItem(
            image=image,
            gt_mask=mask,
            gt_label=torch.tensor(sample.label),
            image_path=sample.path,
            mask_path=sample.mask or None,
            category=sample.category,
            category_index=torch.tensor(category_index),
        )

    @property
    def collate_fn(self) -> Callable[..., UnifiedBatch]:
        """Collate to ``UnifiedBatch``."""
        return UnifiedBatch.collate


class UnifiedDataModule(AnomalibDataModule):
    """Images of any number of categories as one anomalib datamodule.

    Three disjoint parts: training (normal), validation (normal images held out from training, and whatever an index file
    marks ``val``), test. anomalib's own default, validation on the test split, would leak it.

    Args:
        root: Folder or index file.
        layout: Name of the layout; None recognises it.
        categories: Restrict to these; None takes all.
        image_size: Side in pixels, or ``(height, width)``; None takes the size of the model's pre-processor, else 256.
        train_batch_size: Images in a training batch, in each process.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Loader processes; None chooses by cores.
        sampling: ``natural`` or ``balanced`` over categories.
        samples_per_epoch: Images that make one epoch; None: as many as there are.
        val_fraction: Share of each category's normal training images that is held out, 0..1 exclusive.
        skip_bad: Leave unreadable images out (see ``skipped``) instead of stopping.
        verify: Decode every training and validation image once before training starts.
        train_augmentations: Transform of the training images.
        seed: Of the order.
        split_seed: Of which images are held out; None: ``seed``.

    Attributes:
        table: All samples, after ``setup``.
        skipped: Reason for each image left out, by path.
    """

    def __init__(
        self,
        root: str,
        layout: str | None = None,
        categories: list[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int | None = None,
        sampling: str = NATURAL,
        samples_per_epoch: int | None = None,
        val_fraction: float = 0.1,
        skip_bad: bool = False,
        verify: bool = True,
        train_augmentations: Transform | None = None,
        seed: int = 0,
        split_seed: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=default_workers() if num_workers is None else num_workers,
            train_augmentations=train_augmentations,
            val_split_mode="from_dir",
            test_split_mode="from_dir",
            seed=seed,
        )
        if not 0 < val_fraction < 1:
            raise UadxError(f"val_fraction is {val_fraction}", "it is a share: above 0, below 1")
        self.root = root
        self.layout = layout
        self.wanted_categories = categories
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.sampling = sampling
        self.samples_per_epoch = samples_per_epoch
        self.val_fraction = val_fraction
        self.skip_bad = skip_bad
        self.verify = verify
        self.split_seed = seed if split_seed is None else split_seed
        self.skipped: dict[str, str] = {}
        self.table: SampleTable
        self._found: SampleTable | None = None
        self._verified = False
        self._cache: PixelCache | None = None
        self._cache_rows: dict[str, NDArray[np.int64]] = {}

    def index(self) -> SampleTable:
        """Scan the folders and hold images out, without opening any image."""
        self._found = scan(self.root, self.layout, self.wanted_categories)
        return hold_out(self._found, self.val_fraction, self.split_seed)

    def verify_images(
        self, progress: Progress | None = None, cache: PixelCache | None = None, *, keep_split: bool = False
    ) -> None:
        """Decode every training and validation image once; later calls do nothing.

        Where bad images are left out, images are held out from the good ones as if the bad ones had never been there.

        Args:
            progress: Called as images are done.
            cache: Keeps what was decoded, at the size of the cache; None throws it away.
            keep_split: Hold no others out instead: they may have been trained on already.

        Raises:
            UadxError: An image cannot be read and ``skip_bad`` is not set, or a category has none left.
        """
        if self._verified:
            return
        splits = ("train", "val")
        wanted = {split: [self.table.paths[int(i)] for i in self.table.where(split=split)] for split in splits}
        keep = cache.write if cache is not None else None
        good, self.skipped = require_readable(self.table, splits, skip_bad=self.skip_bad, progress=progress, keep=keep)
        if self.skipped and not keep_split and self._found is not None:
            good = hold_out(self._found.without(set(self.skipped)), self.val_fraction, self.split_seed)
        require_parts(self.table, good)
        self.table, self._verified = good, True
        if cache is not None and cache.complete:
            self._cache = cache
            row_of = {path: row for row, path in enumerate(chain(*wanted.values()))}
            for split in splits:
                kept = [row_of[good.paths[int(index)]] for index in good.where(split=split)]
                self._cache_rows[split] = np.array(kept, dtype=np.int64)

    def setup(self, stage: str | None = None) -> None:
        """Index the images, verify those to be trained on, and make the three parts.

        Raises:
            UadxError: An image that training needs cannot be read and ``skip_bad`` is not set, or a part is empty.
        """
        fitting = str(getattr(stage, "value", stage)) in {"fit", "fitting", "None"}
        if not hasattr(self, "table"):
            self.table = self.index()
        if fitting and self.verify:
            self.verify_images()
        size = self.image_size or self._size_of_model() or (256, 256)
        self.train_data = self._part("train", size)
        self.val_data = self._part("val", size)
        self.test_data = self._part("test", size)
        if fitting and len(self.train_data) == 0:
            raise UadxError(f"{self.root}: no normal training images", "a model learns from images of good parts")

    def _setup(self, _stage: str | None = None) -> None:
        self.setup(_stage)

    def _part(self, split: str, size: tuple[int, int]) -> UnifiedDataset:
        cached = split in self._cache_rows and self._cache is not None and self._cache.shape[:2] == size
        return UnifiedDataset(
            self.table,
            self.table.where(split=split),
            size,
            masks=split == "test",
            augmentations=self.train_augmentations if split == "train" else None,
            cache=self._cache if cached else None,
            cache_rows=self._cache_rows[split] if cached else None,
        )

    def _size_of_model(self) -> tuple[int, int] | None:
        transform = get_nested_attr(self, "trainer.model.pre_processor.transform", None)
        resizes = extract_transforms_by_type(transform, Resize) if transform is not None else []
        if not resizes:
            return None
        size = list(resizes[0].size)
        return (size[0], size[-1])

    @property
    def categories(self) -> list[str]:
        """Sorted names of the categories, after ``setup``."""
        return self.table.categories

    @property
    def trained_categories(self) -> list[str]:
        """Sorted names of those that have training images, after ``setup``."""
        return trained_categories(self.table)

    def _loader(self, dataset: UnifiedDataset, **options: Any) -> DataLoader[UnifiedBatch]:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.external_collate_fn or dataset.collate_fn,
            **options,
        )

    def train_dataloader(self) -> DataLoader[UnifiedBatch]:
        """Training batches in the configured order."""
        data: UnifiedDataset = self.train_data
        sampler = CategorySampler(self.table.category_index[data.indices], self.sampling, self.samples_per_epoch, self.seed)
        return self._loader(data, batch_size=self.train_batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[UnifiedBatch]:
        """Held-out batches."""
        data: UnifiedDataset = self.val_data
        return self._loader(data, batch_size=self.eval_batch_size, sampler=ShareSampler(len(data)))

    def test_dataloader(self) -> DataLoader[UnifiedBatch]:
        """Test batches; samples with and without ground-truth masks do not share one."""
        data: UnifiedDataset = self.test_data
        groups = data.has_ground_truth().astype(np.int8)
        return self._loader(data, batch_sampler=GroupedBatchSampler(groups, self.eval_batch_size))

    def predict_dataloader(self) -> DataLoader[UnifiedBatch]:
        """The test batches."""
        return self.test_dataloader()


def default_workers() -> int:
    """Choose the number of loader processes: none on up to two cores, where they would only take turns with training."""
    return 0 if cores() <= 2 else min(8, cores() - 1)
