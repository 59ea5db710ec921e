"""Conformance tests for quantization backends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from uad_plugins.config import resolve
from uad_plugins.data.layouts import scan
from uad_plugins.data.products.catalogue import PRODUCTS
from uad_plugins.data.products.synthesis import synthesize
from uad_plugins.detector import open_detector
from uad_plugins.hookspecs import QuantizerPlugin
from uad_plugins.models.backbones import BUNDLED, BUNDLED_ARCHITECTURE
from uad_plugins.quantization.quantize import Order, quantize
from uad_plugins.quantized import Quantized
from uad_plugins.testing.common import Conformance, check_batch_independence, check_detector, check_scores, read_batch
from uad_plugins.training.train import train

SIDE = 64


class QuantizerConformance(Conformance[QuantizerPlugin]):
    """Checks of a ``QuantizerPlugin``: it quantizes a small run, and the result passes its audit and opens as a detector.

    Attributes:
        plugin: Name of a registered backend, or its description.
        options: Options to quantize with.
        run: A run to quantize instead of the small one that is trained for the checks (STFPM, 64 pixels).
    """

    kind = "quantizer"
    options: ClassVar[Mapping[str, Any]] = {}
    run: ClassVar[Path | None] = None
    _made: ClassVar[tuple[Path, Path] | None] = None

    @pytest.fixture
    def made(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        """Quantize once for all checks of the class: the result's folder, and the data's."""
        cls = type(self)
        if "_made" not in vars(cls):
            folder = tmp_path_factory.mktemp("quantizer")
            data = synthesize(folder / "data", products=list(PRODUCTS)[:2], side=SIDE, train=8, test=2)
            run = cls.run or self.train_example(data, folder / "run")
            quantize(Order(run, folder / "quantized", self.item.name, samples=4, options=dict(cls.options)))
            cls._made = folder / "quantized", data
        assert cls._made is not None
        return cls._made

    @staticmethod
    def train_example(data: Path, out: Path) -> Path:
        """Train the run that is quantized, for one epoch."""
        config = {
            "model": {"name": "stfpm", "backbone": BUNDLED_ARCHITECTURE, "weights": BUNDLED, "layers": ["layer1"]},
            "data": {"image_size": SIDE, "train_batch_size": 8, "num_workers": 0},
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
        }
        train(resolve(flags=config, environment={}), data, out, interactive=False)
        return out

    def test_its_options_can_be_listed(self) -> None:
        """Every option has a default and a description."""
        options = self.item.options
        assert isinstance(options, type), "options is a class"
        assert issubclass(options, BaseModel), "options is a subclass of pydantic.BaseModel"
        for name, field in options.model_fields.items():
            assert not field.is_required(), f"option {name} has a default"
            assert field.description, f"option {name} says what it is"

    def test_its_requirements_can_be_installed(self) -> None:
        """Each requirement names a module and the command that provides it."""
        for requirement in self.item.requires:
            assert requirement.module.strip(), f"a requirement names the module to look for: {requirement}"
            assert len(requirement.install.split()) > 1, f"a requirement has an install command to copy: {requirement}"
            assert " #" not in requirement.install, f"what no command provides is in 'needs': {requirement}"

    def test_the_result_is_good(self, made: tuple[Path, Path]) -> None:
        """It passed the audit of its profile and the comparison with FP32."""
        manifest = Quantized.open(made[0]).manifest()
        assert manifest.status == "finished"
        assert manifest.backend == self.item.name
        assert manifest.files, "it wrote model files"

    def test_the_result_opens_as_a_detector(self, made: tuple[Path, Path]) -> None:
        """``open_detector`` opens it, and it scores image files, each as in any batch."""
        table = scan(made[1])
        paths = [table.paths[int(index)] for index in table.where(split="test")][:3]
        with open_detector(made[0]) as detector:
            check_detector(detector, paths)
            images = read_batch(paths, detector.image_size)
            check_scores(detector, images)
            check_batch_independence(detector, images)
