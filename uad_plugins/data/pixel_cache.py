"""Decoded images on disk: the pass that verifies them before training is not thrown away, and no epoch decodes again."""

from __future__ import annotations

import shutil
import threading
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uad_plugins.imaging import RgbImage, resize_rgb

LIMIT = 16 << 30
"""Largest cache in bytes; a data set that needs more is decoded in every epoch."""


class PixelCache:
    """Images at the network's input size, uint8, one after the other in a file.

    The file is read, not mapped: what the system keeps of it in memory is the system's and is given back when needed, and
    the memory of the process does not grow with the number of images.

    Args:
        path: The file; made by ``write``.
        image_size: ``(height, width)``.

    Attributes:
        complete: False once an image could not be stored.
    """

    def __init__(self, path: Path, image_size: tuple[int, int]) -> None:
        self.path = path
        self.shape = (*image_size, 3)
        self.bytes_per_image = int(np.prod(self.shape))
        self._lock = threading.Lock()
        self._writer: BinaryIO | None = None
        self.complete = True

    def fits(self, images: int) -> bool:
        """Tell whether so many images stay below the limit and leave half of the free disk free."""
        needed = images * self.bytes_per_image
        return needed <= min(LIMIT, shutil.disk_usage(self.path.parent).free // 2)

    def write(self, row: int, image: Image.Image) -> None:
        """Resize an RGB image and store it; rows may come in any order and from any thread."""
        pixels = resize_rgb(image, (self.shape[0], self.shape[1])).tobytes()
        with self._lock:
            if not self.complete:
                return
            try:
                if self._writer is None:
                    self._writer = self.path.open("wb")
                self._writer.seek(row * self.bytes_per_image)
                self._writer.write(pixels)
            except OSError:
                # The disk is full: training goes on without the cache.
                self.complete = False

    def finish(self) -> None:
        """Make everything written readable."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError:
                self.complete = False
            self._writer = None

    def read(self, row: int) -> RgbImage:
        """Return the image of a row, a fresh array ``(H, W, 3)``."""
        pixels: NDArray[np.uint8] = np.empty(self.shape, dtype=np.uint8)
        # Opened anew each time: a file kept open would share its position with worker processes.
        with FileIO(self.path) as file:
            file.seek(row * self.bytes_per_image)
            if file.readinto(pixels.data.cast("B")) != self.bytes_per_image:
                raise OSError(f"{self.path}: row {row} is missing")
        return pixels

    def remove(self) -> None:
        """Close and delete the file."""
        self.finish()
        self.path.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "image_size": self.shape[:2]}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]
