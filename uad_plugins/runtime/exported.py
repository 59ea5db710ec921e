"""What the engines for exported models share: finding the model, normalising, one image at a time. No torch in here."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uad_plugins.deployment.bundle import Bundle, is_bundle
from uad_plugins.detector import Detector
from uad_plugins.evaluation.thresholds import Thresholds
from uad_plugins.imaging import RgbImage
from uad_plugins.quantized import MANIFEST, Quantized

FloatArray = NDArray[np.float32]


class Facts(Protocol):
    """What has to be known of a model file to run it; the manifest of a quantized model says it.

    Attributes:
        categories: Products the model was trained on.
        image_size: ``(height, width)`` of its input in pixels.
        mean: Of the RGB channels of images in 0..1.
        std: The same.
    """

    categories: list[str]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class Network:
    """The facts of a bundle's model."""

    categories: list[str]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Found:
    """A model file that an engine can run.

    Attributes:
        path: The file.
        facts: What has to be known of it.
        thresholds: Decision thresholds.
        pixels: It takes 8-bit pixels ``(1, H, W, 3)`` and normalises them itself.
        outputs: Names of its score and its map; None: they are its first and second output.
        key: Hash of the file's content, under which an engine may keep what it made of it.
    """

    path: Path
    facts: Facts
    thresholds: Thresholds
    pixels: bool
    outputs: tuple[str, str] | None
    key: str


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
        facts: What has to be known of it.
        thresholds: Decision thresholds.
        name: For messages.
    """

    def __init__(self, path: Path, facts: Facts, thresholds: Thresholds, name: str) -> None:
        self.path = path
        self.name = name
        self.categories = facts.categories
        self.image_size = facts.image_size
        self.thresholds = thresholds
        self.mean, self.std = facts.mean, facts.std

    @abstractmethod
    def run(self, image: RgbImage) -> tuple[float, FloatArray]:
        """Run the model on one image, uint8 ``(H, W, 3)`` at ``image_size``: its score, and its map ``(H, W)``."""

    def infer(self, images: RgbImage) -> tuple[FloatArray, FloatArray]:
        """Score a batch; see ``Detector.infer``."""
        scores = np.empty(len(images), np.float32)
        maps = np.empty((len(images), *self.image_size), np.float32)
        for index, image in enumerate(images):
            scores[index], maps[index] = self.run(image)
        return scores, maps


def find_model(path: Path, formats: tuple[str, ...]) -> Found | None:
    """Return the model of a bundle or a quantized model in the first of the formats that it has; None: it has none.

    Args:
        path: Folder or zip file.
        formats: Of ``openvino`` and ``onnx``.

    Raises:
        UadxError: It is unfinished, was rejected, is damaged or of another version.
    """
    if is_bundle(path):
        return _of_bundle(Bundle.open(path), formats)
    if not (path / MANIFEST).is_file():
        return None
    station = Quantized.open(path)
    manifest = station.manifest()
    names = {"openvino": "model.xml", "onnx": "model.onnx"}
    name = next((names[kind] for kind in formats if names[kind] in manifest.files), None)
    if name is None:
        return None
    station.check_files(manifest)
    hashes = {file: str(entry["sha256"]) for file, entry in manifest.files.items()}
    return Found(station.folder / name, manifest, station.thresholds(), False, None, _key(name, hashes))


def _of_bundle(bundle: Bundle, formats: tuple[str, ...]) -> Found | None:
    manifest = bundle.manifest
    names = {"openvino": manifest.openvino, "onnx": manifest.onnx}
    name = next((names[kind] for kind in formats if names[kind] is not None), None)
    if name is None:
        return None
    preprocessing = manifest.preprocessing
    return Found(
        bundle.file(name),
        Network(manifest.categories, manifest.image_size, preprocessing.mean, preprocessing.std),
        bundle.thresholds,
        preprocessing.normalised_by == "graph",
        (manifest.outputs.score, manifest.outputs.map),
        _key(name, {file: facts.sha256 for file, facts in manifest.files.items()}),
    )


def _key(name: str, hashes: dict[str, str]) -> str:
    """Return the hash of a model's content: of an OpenVINO model that of graph and weights."""
    weights = hashes.get(str(Path(name).with_suffix(".bin")), "")
    return hashes[name][:32] + weights[:32]
