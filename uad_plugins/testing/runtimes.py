"""Conformance tests for inference engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from uad_plugins.detector import Detector
from uad_plugins.hookspecs import RuntimePlugin
from uad_plugins.imaging import RgbImage
from uad_plugins.registry import installed
from uad_plugins.testing.common import (
    FOREIGN_FILES,
    Conformance,
    check_batch_independence,
    check_detector,
    check_scores,
    write_files,
)

IMAGES = 3


class RuntimeConformance(Conformance[RuntimePlugin]):
    """Checks of a ``RuntimePlugin``.

    Attributes:
        plugin: Name of a registered engine, or its description.
        foreign: Files of a folder that the engine does not take.

    Override the fixture ``station`` to return a folder that the engine opens: the checks of the detector need one and are
    skipped without it.
    """

    kind = "runtime"
    foreign: ClassVar[tuple[str, ...]] = FOREIGN_FILES

    @pytest.fixture
    def station(self) -> Path | None:
        """Return a folder that the engine opens (a run, a quantized model or a bundle); None: there is none at hand."""
        return None

    @pytest.fixture
    def detector(self, station: Path | None) -> Iterator[Detector]:
        """Open the station."""
        if station is None:
            pytest.skip("no folder to open: override the fixture 'station'")
        missing = [requirement.module for requirement in self.item.requires if not installed(requirement.module)]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")
        opened = self.item.open(station)
        assert opened is not None, f"open() takes its own kind of folder: {station}"
        with opened:
            yield opened

    def test_it_leaves_a_foreign_folder_to_others(self, tmp_path: Path) -> None:
        """Engines are asked in turn: ``open`` returns None for what is not its own, and raises nothing."""
        empty = tmp_path / "empty"
        empty.mkdir()
        assert self.item.open(empty) is None, "open() returns None for an empty folder"
        foreign = write_files(tmp_path / "foreign", self.foreign)
        assert self.item.open(foreign) is None, f"open() returns None for a folder of {', '.join(self.foreign)}"
        assert self.item.open(foreign / self.foreign[0]) is None, "open() returns None for a file"

    def test_its_requirements_can_be_installed(self) -> None:
        """Each requirement names a module and the command that provides it; its check gives None or a reason."""
        for requirement in self.item.requires:
            assert requirement.module.strip(), f"a requirement names the module to look for: {requirement}"
            assert len(requirement.install.split()) > 1, f"a requirement has an install command to copy: {requirement}"
            assert " #" not in requirement.install, f"what no command provides is in 'needs': {requirement}"
            assert len(requirement.install.splitlines()) == 1, f"an install command is one line: {requirement}"
            if requirement.check is not None and installed(requirement.module):
                reason = requirement.check()
                assert reason is None or reason.strip(), f"a check returns None or a reason: {requirement}"

    def test_its_detector_scores_image_files(self, detector: Detector, tmp_path: Path) -> None:
        """The detector says what it is, and scores files of any size in order."""
        paths = []
        for index, pixels in enumerate(_images((40, 56))):
            paths.append(str(tmp_path / f"{index}.png"))
            Image.fromarray(pixels).save(paths[-1])
        check_detector(detector, paths)

    def test_scores_are_finite_and_maps_have_the_size_of_the_image(self, detector: Detector) -> None:
        """Scores are float32 ``(N,)``, maps float32 ``(N, H, W)``."""
        check_scores(detector, _images(detector.image_size))

    def test_a_batch_scores_as_its_images_do(self, detector: Detector) -> None:
        """What else is in a batch does not change the score of an image."""
        check_batch_independence(detector, _images(detector.image_size))


def _images(size: tuple[int, int]) -> RgbImage:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, *size, 3)).astype(np.uint8)
