"""Conformance tests for data layouts."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from uad_plugins.data.layouts import recognise
from uad_plugins.data.samples import ANOMALOUS, NORMAL, SPLITS, Sample, SampleTable, relative_to
from uad_plugins.hookspecs import LayoutPlugin
from uad_plugins.imaging import is_image
from uad_plugins.testing.common import FOREIGN_FILES, Conformance, write_files

Row = tuple[str, str, int, str, str, str]


@contextmanager
def images_opened() -> Iterator[list[str]]:
    """Yield the list to which the name of each image file opened inside the ``with`` block is added.

    It records instead of raising: a layout that swallows every exception would not be caught otherwise.
    """
    opened: list[str] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *args: Any, **kwargs: Any) -> Any:
            name = getattr(file, "name", file)
            if isinstance(name, (str, bytes, os.PathLike)) and is_image(Path(os.fsdecode(name)).name):
                opened.append(Path(os.fsdecode(name)).name)
            return function(file, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in (Image, builtins, io):
            patch.setattr(module, "open", recording(module.open))
        yield opened


class LayoutConformance(Conformance[LayoutPlugin]):
    """Checks of a ``LayoutPlugin``.

    Attributes:
        plugin: Name of a registered layout, or its description.
        files: Files of a small data set in this layout, relative to its root: pictures are written under the names of
            images, empty files under others. At least one good training image and one anomalous image. Override
            ``make_example`` where that does not do.
        foreign: Files of a folder that has another layout.
    """

    kind = "layout"
    files: ClassVar[Sequence[str]] = ()
    foreign: ClassVar[Sequence[str]] = FOREIGN_FILES

    def make_example(self, root: Path) -> None:
        """Write a small data set in this layout to an empty folder."""
        assert self.files, f"{type(self).__name__}: set 'files' to those of a small data set, or override 'make_example'"
        write_files(root, self.files)

    def _example(self, folder: Path) -> Path:
        root = folder / "data"
        root.mkdir(parents=True)
        self.make_example(root)
        return root

    def _rows(self, root: Path) -> list[Row]:
        return sorted(
            (relative_to(s.path, root), s.category, int(s.label), s.split, relative_to(s.mask, root), s.defect)
            for s in self.item.scan(root)
        )

    def test_it_recognises_its_example(self, tmp_path: Path) -> None:
        """The confidence in the example is above 0 and at most 1."""
        confidence = self.item.recognise(self._example(tmp_path))
        assert 0 < confidence <= 1, f"recognise() returns a confidence in (0, 1] for its own example: {confidence}"

    def test_it_is_chosen_for_its_example(self, tmp_path: Path) -> None:
        """No other layout installed is more confident."""
        chosen = recognise(self._example(tmp_path)).name
        assert chosen == self.item.name, f"layout '{chosen}' takes the example: raise the confidence or the priority"

    def test_it_does_not_claim_an_empty_folder(self, tmp_path: Path) -> None:
        """The confidence in an empty folder is 0."""
        assert self.item.recognise(tmp_path) == 0, "recognise() returns 0 for an empty folder"

    def test_it_does_not_claim_a_foreign_folder(self, tmp_path: Path) -> None:
        """The confidence in a folder of other things is 0."""
        root = write_files(tmp_path / "foreign", self.foreign)
        assert self.item.recognise(root) == 0, f"recognise() returns 0 for a folder of {', '.join(self.foreign)}"

    def test_it_does_not_claim_a_foreign_file(self, tmp_path: Path) -> None:
        """Every layout is asked when the user names a file: the confidence is 0, and nothing is raised."""
        file = write_files(tmp_path, ["notes.txt"]) / "notes.txt"
        assert self.item.recognise(file) == 0, "recognise() returns 0 for a text file"

    def test_samples_are_well_formed(self, tmp_path: Path) -> None:
        """Paths are absolute and exist; split, label, category and defect are what ``Sample`` says."""
        samples = list(self.item.scan(self._example(tmp_path)))
        assert samples, "scan() finds the images of the example"
        for sample in samples:
            assert isinstance(sample, Sample), f"scan() returns Sample objects, not {type(sample).__name__}"
            for what, path in (("path", sample.path), ("mask", sample.mask)):
                assert isinstance(path, str), f"{what} is a string, not {type(path).__name__}: {sample}"
            assert Path(sample.path).is_absolute(), f"path is absolute: {sample}"
            assert Path(sample.path).is_file(), f"path exists: {sample}"
            if sample.mask:
                assert Path(sample.mask).is_absolute(), f"mask is absolute: {sample}"
                assert Path(sample.mask).is_file(), f"mask exists: {sample}"
            assert sample.split in SPLITS, f"split is one of {', '.join(SPLITS)}: {sample}"
            assert sample.label in (NORMAL, ANOMALOUS), f"label is 0 or 1: {sample}"
            assert sample.category.strip(), f"category is not empty: {sample}"
            assert (sample.defect == "good") == (sample.label == NORMAL), f"normal images alone have defect 'good': {sample}"
        table = SampleTable(samples, tmp_path)
        assert len(set(table.paths)) == len(table), "no image is listed twice"

    def test_it_trains_on_good_images_alone(self, tmp_path: Path) -> None:
        """There are training images, no anomalous one among them, and an anomalous one elsewhere."""
        samples = list(self.item.scan(self._example(tmp_path)))
        training = [sample for sample in samples if sample.split == "train"]
        assert training, "the example has training images"
        wrong = [sample.path for sample in training if sample.label != NORMAL]
        assert not wrong, f"no anomalous image is trained on: {wrong}"
        assert any(sample.label == ANOMALOUS for sample in samples), "the example has an anomalous image"

    def test_it_opens_no_image(self, tmp_path: Path) -> None:
        """Neither recognising nor scanning opens an image, so that emptied files give the same samples."""
        root = self._example(tmp_path)
        before = self._rows(root)
        with images_opened() as opened:
            self.item.recognise(root)
            list(self.item.scan(root))
        assert not opened, f"100 000 images cannot be opened to be listed; opened: {opened}"
        for path in root.rglob("*"):
            if path.is_file() and is_image(path.name):
                path.write_bytes(b"")
        assert self._rows(root) == before, "samples do not depend on what is in the images"

    def test_it_changes_nothing(self, tmp_path: Path) -> None:
        """Data sets are read from write-protected shares."""
        root = self._example(tmp_path)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        self.item.recognise(root)
        list(self.item.scan(root))
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before, "scan() leaves the data as it is"

    def test_it_gives_the_same_samples_twice(self, tmp_path: Path) -> None:
        """Scanning again gives the same samples, in any order."""
        root = self._example(tmp_path)
        assert self._rows(root) == self._rows(root)

    def test_it_works_wherever_the_data_lies(self, tmp_path: Path) -> None:
        """Blanks and letters of any alphabet in the path change nothing, nor does where the folder lies."""
        plain = self._example(tmp_path / "plain")
        moved = self._example(tmp_path / "Werk 2 – Bänder [50%] 検査")
        assert self.item.recognise(moved) == self.item.recognise(plain)
        assert self._rows(moved) == self._rows(plain)
