"""What the engines for exported models share: opening the folder, normalising, one image at a time. No torch in here."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uad_plugins.detector import Detector
from uad_plugins.evaluation.thresholds import NO_THRESHOLDS, Thresholds
from uad_plugins.imaging import RgbImage
from uad_plugins.quantized import MANIFEST, Quantized, QuantizedManifest

FloatArray = NDArray[np.float32]


def normalise(images: RgbImage, mean: tuple[float, ...], std: tuple[float, ...]) -> FloatArray:
    """Turn 8-bit images into what a network takes.

    Args:
        images: uint8 ``(N, H, W, 3)``.
        mean: Of each channel, of images in 0..1.
        std: Of each channel.

    Returns:
        float32 ``(N, 3, H, W)``, contiguous.
    """
    scaled = (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


class ExportedDetector(Detector):
    """Runs a model file for one image of a fixed size.

    Args:
        path: The model file.
        manifest: Of the quantized model.
        thresholds: Decision thresholds.
        name: For messages.
    """

    def __init__(self, path: Path, manifest: QuantizedManifest, thresholds: Thresholds, name: str) -> None:
        self.path = path
        self.name = name
        self.categories = manifest.categories
        self.image_size = manifest.image_size
        self.thresholds = thresholds
        self.mean, self.std = manifest.mean, manifest.std

    @abstractmethod
    def run(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Run the model on a normalised image, float32 ``(1, 3, H, W)``: score ``(1,)`` and map ``(1, H, W)``."""

    def infer(self, images: RgbImage) -> tuple[FloatArray, FloatArray]:
        """Score a batch; see ``Detector.infer``."""
        scores = np.empty(len(images), np.float32)
        maps = np.empty((len(images), *self.image_size), np.float32)
        for index, image in enumerate(images):
            score, anomaly_map = self.run(normalise(image[None], self.mean, self.std))
            scores[index], maps[index] = score.reshape(()), anomaly_map.reshape(self.image_size)
        return scores, maps


def find_model(folder: Path, names: tuple[str, ...]) -> tuple[Path, QuantizedManifest, Thresholds] | None:
    """Return the first of the named files that a quantized model has, with manifest and thresholds; None: it has none.

    Raises:
        UadxError: It is unfinished, was rejected, is damaged or of another version.
    """
    if not (folder / MANIFEST).is_file():
        return None
    station = Quantized.open(folder)
    manifest = station.manifest()
    name = next((name for name in names if name in manifest.files), None)
    if name is None:
        return None
    station.check_files(manifest)
    thresholds = station.thresholds() if station.thresholds_file.is_file() else NO_THRESHOLDS
    return folder / name, manifest, thresholds
