"""What the conformance tests of all kinds share: finding the plugin, example files, checks of a detector."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pytest
from PIL import Image

from uad_plugins.detector import Detector
from uad_plugins.hookspecs import KINDS
from uad_plugins.imaging import RgbImage, is_image, read_rgb, resize_rgb
from uad_plugins.registry import Entry, registry

Description = TypeVar("Description")

FOREIGN_FILES = ("readme.txt", "papers/report.pdf", "photos/holiday/IMG_0001.jpg", "photos/holiday/IMG_0002.jpg")
"""Files that have nothing to do with inspection."""


@contextmanager
def registered(kind: str, item: Any) -> Iterator[None]:
    """Register a description inside the ``with`` block, in the place of one with its name."""
    entries, key = registry().entries, (kind, item.name)
    before = entries.get(key)
    entries[key] = Entry(kind, item.name, "under test", "", item)
    try:
        yield
    finally:
        if before is None:
            del entries[key]
        else:
            entries[key] = before


def write_files(root: Path, files: Sequence[str]) -> Path:
    """Write files below a folder: pictures under the names of images, empty files under others."""
    root.mkdir(parents=True, exist_ok=True)
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_image(path.name):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            Image.fromarray(rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)).save(path)
        else:
            path.touch()
    return root


def read_batch(paths: Sequence[str], size: tuple[int, int]) -> RgbImage:
    """Read images to one uint8 batch ``(N, H, W, 3)``."""
    return np.stack([resize_rgb(read_rgb(path), size) for path in paths])


def check_scores(detector: Detector, images: RgbImage) -> None:
    """Check shapes, types and values of what a detector returns for a batch."""
    scores, maps = detector.infer(images)
    number, (height, width) = len(images), detector.image_size
    assert scores.shape == (number,), "scores are (N,)"
    assert scores.dtype == np.float32, "scores are float32"
    assert maps.shape == (number, height, width), "maps are (N, H, W) at image_size"
    assert maps.dtype == np.float32, "maps are float32"
    assert np.isfinite(scores).all(), f"scores are finite numbers: {scores}"
    assert np.isfinite(maps).all(), "maps hold finite numbers"


def check_batch_independence(detector: Detector, images: RgbImage) -> None:
    """Check that an image scores the same in a batch and alone."""
    scores, maps = detector.infer(images)
    for index in range(len(images)):
        score, anomaly_map = detector.infer(images[index : index + 1])
        why = f"image {index} scores otherwise alone than in a batch of {len(images)}"
        np.testing.assert_allclose(score[0], scores[index], rtol=1e-3, atol=1e-6, err_msg=why)
        tolerance = 1e-4 * float(np.abs(maps[index]).max()) + 1e-7
        np.testing.assert_allclose(anomaly_map[0], maps[index], rtol=1e-3, atol=tolerance, err_msg=f"map: {why}")


def check_detector(detector: Detector, paths: Sequence[str]) -> None:
    """Check what a detector says of itself, and that it scores image files."""
    assert isinstance(detector, Detector), f"a subclass of uad_plugins.detector.Detector, not {type(detector).__name__}"
    assert detector.name, "a detector names where it came from"
    assert detector.engine, "a detector names what executes it"
    assert detector.categories, "a detector names the products it was trained on"
    height, width = detector.image_size
    assert height > 0, "image_size is (height, width)"
    assert width > 0, "image_size is (height, width)"
    predictions = list(detector.stream(paths, batch_size=2))
    assert [prediction.path for prediction in predictions] == list(paths), "predictions come in the order asked for"
    assert all(math.isfinite(prediction.score) for prediction in predictions), "scores are finite numbers"


class Conformance(Generic[Description]):
    """Base of the conformance tests.

    Attributes:
        kind: Kind of plugin, set by the subclass of each kind.
        plugin: Name of a registered plugin, or a description. Set it in your test class.
    """

    kind: ClassVar[str]
    plugin: ClassVar[Any]

    @property
    def item(self) -> Description:
        """The description under test."""
        plugin = getattr(self, "plugin", None)
        assert plugin is not None, f"{type(self).__name__}: set 'plugin' to the name or description of your {self.kind}"
        found: Description = registry().get(self.kind, plugin) if isinstance(plugin, str) else plugin
        return found

    @pytest.fixture(autouse=True)
    def registered_plugin(self) -> Iterator[None]:
        """Register a description that is under test without being installed."""
        with registered(self.kind, self.item):
            yield

    def test_its_description_is_complete(self) -> None:
        """The description is of the right class, with a name to type and a summary of one line."""
        item: Any = self.item
        cls = KINDS[self.kind][1]
        assert isinstance(item, cls), f"a {self.kind} is described by a {cls.__name__}, not a {type(item).__name__}"
        assert item.name, "a plugin has a name"
        assert item.name.split() == [item.name], f"a name is typed after a flag, so it has no blanks: '{item.name}'"
        assert item.summary.strip(), "a summary is shown in listings"
        assert len(item.summary.splitlines()) == 1, "a summary is one line"
