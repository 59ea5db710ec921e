"""Patches that teachers are distilled on: random crops of images, the same for the same step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uad_plugins.artifacts import checked, sha256_of
from uad_plugins.data.layouts.walking import images as images_below
from uad_plugins.errors import UadxError
from uad_plugins.imaging import ImageError, RgbImage, read_rgb, resize_rgb
from uad_plugins.models.uninformed_students.distillation import Batch

POOL = 512
"""Decoded images kept in memory at a time."""

STEPS_PER_POOL = 500
"""Steps after which other images are decoded, where there are more."""

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


class PatchSource:
    """Draws batches of patches from images.

    Args:
        images: Image number -> uint8 ``(H, W, 3)``; None where it cannot be used.
        count: How many images there are.
        fingerprint: Of the images, for the cache of teachers.
        description: What they are, in words.
    """

    def __init__(self, images: Callable[[int], RgbImage | None], count: int, fingerprint: str, description: str) -> None:
        self.images, self.count, self.fingerprint, self.description = images, count, fingerprint, description
        self._pool: list[RgbImage] = []
        self._pool_of: tuple[int, int, int] | None = None
        self._unreadable = 0

    def batches(self, patch_size: int, batch_size: int, seed: int, twins: bool = True) -> Callable[[int], Batch]:
        """Return a function from a step to its batch: normalised float32 ``(N, 3, p, p)``, twice.

        The second, None where not asked for, holds the twins: the same patches shifted by up to an eighth of their side and
        changed in intensity by up to 10 %. Patches that follow each other are of different images.

        Args:
            patch_size: Side of a patch.
            batch_size: Patches in a batch.
            seed: Of the choice of patches.
            twins: Make the twins; the patches are the same either way.
        """

        def batch(step: int) -> Batch:
            pool = self._images_of(step // STEPS_PER_POOL, patch_size, seed)
            rng = np.random.default_rng((seed, step))
            if twins and len(pool) < 2:
                raise UadxError(
                    f"{self.description}: a single image", "the metric loss needs patches of others: give more images"
                )
            chosen = taking_turns(rng, len(pool), batch_size)
            reach = max(1, patch_size // 8)
            patches = np.empty((batch_size, patch_size, patch_size, 3), np.float32)
            moved = np.empty_like(patches) if twins else None
            for row, index in enumerate(chosen):
                image = pool[index]
                y = int(rng.integers(0, image.shape[0] - patch_size + 1))
                x = int(rng.integers(0, image.shape[1] - patch_size + 1))
                # Drawn in any case: the next patches depend on it.
                shift = rng.integers(-reach, reach + 1, size=2)
                patches[row] = image[y : y + patch_size, x : x + patch_size]
                if moved is not None:
                    moved_y = int(np.clip(y + shift[0], 0, image.shape[0] - patch_size))
                    moved_x = int(np.clip(x + shift[1], 0, image.shape[1] - patch_size))
                    moved[row] = image[moved_y : moved_y + patch_size, moved_x : moved_x + patch_size]
            if moved is None:
                return _normalised(patches), None
            moved = np.clip(moved * rng.uniform(0.9, 1.1, size=(batch_size, 1, 1, 1)).astype(np.float32), 0, 255)
            return _normalised(patches), _normalised(moved)

        return batch

    def _images_of(self, chunk: int, patch_size: int, seed: int) -> list[RgbImage]:
        chunk = chunk if self.count > POOL else 0
        # One source serves several scales, and what is large enough depends on the patch.
        if (chunk, patch_size, seed) != self._pool_of:
            rng = np.random.default_rng((seed, chunk, 1))
            chosen = rng.choice(self.count, size=min(POOL, self.count), replace=False)
            found = [self.images(int(index)) for index in np.sort(chosen)]
            self._unreadable = sum(image is None for image in found)
            self._pool = [image for image in found if image is not None and min(image.shape[:2]) >= patch_size]
            self._pool_of = (chunk, patch_size, seed)
        if not self._pool:
            unreadable = f" ({self._unreadable} cannot be read)" if self._unreadable else ""
            raise UadxError(
                f"{self.description}: no image of at least {patch_size}x{patch_size} pixels{unreadable}",
                "a teacher is distilled on crops of that size",
            )
        return self._pool


def taking_turns(rng: np.random.Generator, images: int, count: int) -> NDArray[np.int64]:
    """Return the image of each patch in a batch, such that neighbours, the last and the first too, are of different images.

    The neighbour in a batch is the negative of a patch.
    """
    order = rng.permutation(images)
    chosen = np.resize(order, count)
    if images > 2 and chosen[-1] == chosen[0]:
        chosen[-1] = order[1]
    return chosen


def from_folder(folder: Path, shorter_side: int = 256) -> PatchSource:
    """Use all images below a folder, for example natural images; larger ones are shrunk to the shorter side given.

    Raises:
        UadxError: There is no image.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UadxError(f"{folder}: no such folder of images", "a teacher is distilled on the images in it")
    paths = sorted(images_below(folder))
    if not paths:
        raise UadxError(f"{folder}: no image in it", "PNG, JPEG, BMP, TIFF and WebP are read")

    def image(index: int) -> RgbImage | None:
        try:
            picture = read_rgb(paths[index])
        except ImageError:
            return None
        share = min(1.0, shorter_side / min(picture.size))
        return resize_rgb(picture, (round(picture.height * share), round(picture.width * share)))

    names = [str(Path(path).relative_to(folder)) for path in paths]
    return PatchSource(image, len(paths), _fingerprint(paths, names), f"{len(paths)} images in {folder}")


def from_dataset(data: Any, size: tuple[int, int]) -> PatchSource:
    """Use the images of a training data set, uadx's or anomalib's, at the network's input size.

    Raises:
        UadxError: It is another one.
    """
    table = getattr(data, "table", None)
    if table is not None:
        paths = [table.paths[int(i)] for i in data.indices]
        names = [table.relative(int(i)) for i in data.indices]
    elif hasattr(data, "samples"):
        paths = [str(path) for path in data.samples.image_path]
        names = [Path(path).name for path in paths]
    else:
        raise UadxError(
            "the files of the training images are not known: their data set is neither of uadx nor of anomalib",
            "give the teacher natural images: teacher.images=FOLDER, or drawn ones: teacher.images=procedural",
        )
    return from_samples(paths, names, size)


def from_samples(paths: Sequence[str], names: Sequence[str], size: tuple[int, int]) -> PatchSource:
    """Use training images at the network's input size.

    Args:
        paths: Image files.
        names: Their names relative to the data set, for the fingerprint.
        size: ``(height, width)``.
    """

    def image(index: int) -> RgbImage | None:
        return resize_rgb(read_rgb(paths[index]), size)

    print_ = _fingerprint(paths, [*names, f"{size[0]}x{size[1]}"])
    return PatchSource(image, len(paths), print_, f"{len(paths)} normal training images at {size[0]}x{size[1]}")


def _fingerprint(paths: Sequence[str], names: Sequence[str]) -> str:
    """Hash names and contents, at some hundred megabytes a second for each core: little beside a distillation."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n".encode())
    with ThreadPoolExecutor() as pool:
        for content in pool.map(lambda path: checked(Path(path), sha256_of), paths):
            digest.update(f"{content}\n".encode())
    return digest.hexdigest()


def _normalised(patches: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(((patches / 255 - MEAN) / STD).transpose(0, 3, 1, 2)))
