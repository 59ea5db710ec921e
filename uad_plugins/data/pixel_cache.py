"""Decoded images on disk: the pass that verifies them before training is not thrown away, and no epoch decodes again."""

from __future__ import annotations

import os
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

    Where the system gives an open file a place in ``/proc`` the file loses its name at once, and with it the danger that a
    killed training leaves it behind; worker processes find it there.

    Args:
        path: The file; made by ``write``.
        image_size: ``(height, width)``.

    Attributes:
        complete: False once an image could not be stored.
    """

    def __init__(self, path: Path, image_size: tuple[int, int]) -> None:
        self.path = self._place = path
        self.shape = (*image_size, 3)
        self.bytes_per_image = int(np.prod(self.shape))
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
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
                if self._file is None:
                    # Another file than that of a killed training, which its workers may not have closed yet.
                    self.path.unlink(missing_ok=True)
                    self._file = self.path.open("w+b", buffering=0)
                    self._place = self._nameless(self._file.fileno())
                self._file.seek(row * self.bytes_per_image)
                if self._file.write(pixels) != len(pixels):
                    self.complete = False
            except OSError:
                # The disk is full: training goes on without the cache.
                self.complete = False

    def read(self, row: int) -> RgbImage:
        """Return the image of a row, a fresh array ``(H, W, 3)``."""
        pixels: NDArray[np.uint8] = np.empty(self.shape, dtype=np.uint8)
        # Opened anew each time: a file kept open would share its position with worker processes.
        with FileIO(self._place) as file:
            file.seek(row * self.bytes_per_image)
            if file.readinto(pixels.data.cast("B")) != self.bytes_per_image:
                raise OSError(f"{self.path}: row {row} is missing")
        return pixels

    def _nameless(self, descriptor: int) -> Path:
        """Take the open file's name away where it can be read without; return where it is read."""
        place = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        if not os.access(place, os.R_OK):
            return self.path
        self.path.unlink()
        return place

    def remove(self) -> None:
        """Close and delete the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self._place, "image_size": self.shape[:2]}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]
