"""Conformance tests for methods."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from anomalib.models import AnomalibModule
from lightning.pytorch import Trainer
from pydantic import BaseModel

from uad_plugins.artifacts import Run
from uad_plugins.config import TrainConfig, merge, read_yaml, resolve
from uad_plugins.data.layouts import scan
from uad_plugins.data.products.catalogue import PRODUCTS
from uad_plugins.data.products.synthesis import synthesize
from uad_plugins.detector import open_detector
from uad_plugins.hookspecs import ModelPlugin
from uad_plugins.models.backbones import BUNDLED, BUNDLED_ARCHITECTURE, BUNDLED_FILE
from uad_plugins.models.torch_detector import TorchDetector
from uad_plugins.testing.common import Conformance, check_batch_independence, check_detector, check_scores, read_batch
from uad_plugins.training.checkpointing import AtomicCheckpointIO
from uad_plugins.training.quiet import quiet_libraries
from uad_plugins.training.train import train

SIDE = 64
SUPPORTS = frozenset({"export", "qat"})
HERE = (None, "", "localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Trained:
    """The training that the checks of a class share.

    Attributes:
        run: The run's folder.
        config: What it was trained with.
        categories: Products it was trained on.
        images: Some test images.
        fetched: Hosts that were asked for while it was built and trained.
    """

    run: Path
    config: TrainConfig
    categories: list[str]
    images: list[str]
    fetched: list[str]


@contextmanager
def offline(folder: Path) -> Iterator[list[str]]:
    """Take the network, and what was downloaded before, away inside the ``with`` block.

    Args:
        folder: Below it lie the empty caches.

    Yields:
        The list to which each host that is asked for is added.
    """
    hosts: list[str] = []
    lookup = socket.getaddrinfo

    def refuse(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host in HERE:
            return lookup(host, *args, **kwargs)
        hosts.append(str(host))
        raise OSError("conformance tests run without a network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "no_hub_cache"))
        patch.setenv("TORCH_HOME", str(folder / "no_torch_home"))
        yield hosts


class ModelConformance(Conformance[ModelPlugin]):
    """Checks of a ``ModelPlugin``: it is built, trained for an epoch on synthetic products, and opened again.

    Attributes:
        plugin: Name of a registered method, or its description.
        config: What the method needs besides the small configuration of the checks (64 pixels, one epoch, CPU; for a method
            that takes it, the backbone resnet18 with the bundled weights). For ``anomalib:CLASS`` give ``model.name``.
    """

    kind = "model"
    config: ClassVar[Mapping[str, Any]] = {}
    _trained: ClassVar[Trained | None] = None

    def small_config(self, over: Mapping[str, Any] | None = None) -> TrainConfig:
        """Resolve the configuration of the checks, with changes."""
        plugin = self.item
        small: dict[str, Any] = {
            "model": {"name": plugin.name},
            "data": {"image_size": SIDE, "train_batch_size": 8, "eval_batch_size": 8, "num_workers": 0},
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
        }
        if plugin.backbones is not None and BUNDLED_ARCHITECTURE in plugin.backbones():
            small["model"] |= {"backbone": BUNDLED_ARCHITECTURE, "weights": BUNDLED}
        return resolve(flags=merge(merge(small, self.config), over or {}), environment={})

    @pytest.fixture(autouse=True)
    def fetched(self, tmp_path: Path) -> Iterator[list[str]]:
        """Take the network away; see ``offline``."""
        with offline(tmp_path) as hosts:
            yield hosts

    @pytest.fixture
    def trained(self, fetched: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
        """Train once for all checks of the class."""
        cls = type(self)
        if "_trained" not in vars(cls):
            cls._trained = self.train_example(tmp_path_factory.mktemp("conformance"), fetched)
        assert cls._trained is not None
        return cls._trained

    def train_example(self, folder: Path, fetched: list[str]) -> Trained:
        """Train for one epoch on synthetic products below a folder."""
        # Not at the size of the network, so that a missing resize shows.
        data = synthesize(folder / "products", products=list(PRODUCTS)[:2], side=SIDE + 8, train=8, test=2)
        config, weights = self.small_config(), folder / "weights"
        if config.model.weights == BUNDLED:
            # The same weights from a file that is deleted after training: opening the run must not need it.
            weights.mkdir()
            shutil.copy(BUNDLED_FILE, weights / f"{BUNDLED_ARCHITECTURE}{BUNDLED_FILE.suffix}")
            config = self.small_config({"model": {"weights": str(weights)}})
        train(config, data, folder / "run", interactive=False)
        shutil.rmtree(weights, ignore_errors=True)
        table = scan(data)
        images = [table.paths[int(index)] for index in table.where(split="test")]
        return Trained(folder / "run", config, table.categories, images, list(fetched))

    @pytest.fixture
    def detector(self, trained: Trained) -> Iterator[TorchDetector]:
        """Open the run on the CPU."""
        with TorchDetector.open(trained.run, device="cpu") as opened:
            assert isinstance(opened, TorchDetector)
            yield opened

    def test_its_options_recipe_and_backbones_can_be_listed(self) -> None:
        """What listings and configurations look at is there."""
        plugin = self.item
        assert isinstance(plugin.options, type), "options is a class"
        assert issubclass(plugin.options, BaseModel), "options is a subclass of pydantic.BaseModel"
        for recipe in sorted(plugin.recipe.glob("*.yaml")) if plugin.recipe and plugin.recipe.is_dir() else [plugin.recipe]:
            assert recipe is None or read_yaml(recipe), f"recipe is a YAML file: {recipe}"
        assert plugin.backbones is None or plugin.backbones(), "backbones() returns names; None for a method without one"
        assert plugin.supports <= SUPPORTS, f"supports is a subset of {', '.join(sorted(SUPPORTS))}"

    @pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 96)])
    def test_it_is_built_for_the_configured_size(self, size: tuple[int, int]) -> None:
        """``build`` gives an ``AnomalibModule`` whose pre-processor resizes to the configured ``(height, width)``."""
        model = self.item.build(self.small_config({"data": {"image_size": list(size)}}))
        assert isinstance(model, AnomalibModule), f"build() returns an AnomalibModule, not {type(model).__name__}"
        assert model.pre_processor is not None, "the module has a pre-processor"
        resized = model.pre_processor(torch.rand(1, 3, SIDE + 16, SIDE + 48))
        assert tuple(resized.shape) == (1, 3, *size), "the pre-processor gives images of the configured size"

    def test_one_epoch_gives_a_run(self, trained: Trained) -> None:
        """Training ends with a finished run that says what it was trained on."""
        manifest = Run.open(trained.run).manifest()
        assert manifest.categories == trained.categories, "one model is trained on all categories"
        assert manifest.model == trained.config.model.name

    def test_the_run_opens_as_a_detector(self, trained: Trained) -> None:
        """``open_detector`` opens the run, and it scores image files."""
        with open_detector(trained.run) as opened:
            check_detector(opened, trained.images)
            assert tuple(opened.image_size) == trained.config.data.size, "image_size is the configured one"
            assert opened.categories == trained.categories

    def test_scores_are_finite_and_maps_have_the_size_of_the_image(self, trained: Trained, detector: TorchDetector) -> None:
        """Scores are float32 ``(N,)``, maps float32 ``(N, H, W)``."""
        check_scores(detector, read_batch(trained.images, detector.image_size))

    def test_a_batch_scores_as_its_images_do(self, trained: Trained, detector: TorchDetector) -> None:
        """What else is in a batch does not change the score of an image."""
        check_batch_independence(detector, read_batch(trained.images, detector.image_size))

    def test_a_checkpoint_brings_all_it_learnt(self, trained: Trained, detector: TorchDetector, tmp_path: Path) -> None:
        """Loaded weights are the stored ones; saved and loaded again, the module gives equal scores."""
        path = Run.open(trained.run).checkpoint
        loaded = self.item.load(path, trained.config)
        assert isinstance(loaded, AnomalibModule), f"load() returns an AnomalibModule, not {type(loaded).__name__}"
        stored = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
        state = loaded.state_dict()
        differing = [
            name
            for name, value in stored.items()
            if not isinstance(value, torch.Tensor)
            or name not in state
            or not torch.equal(torch.nan_to_num(state[name]), torch.nan_to_num(value))
        ]
        assert not differing, f"load() does not restore {', '.join(differing[:5])} from the checkpoint"
        again = self._round_trip(loaded, trained.config, tmp_path / "again.ckpt")
        images = read_batch(trained.images, detector.image_size)
        expected_scores, expected_maps = detector.infer(images)
        copy = TorchDetector(again, "again", detector.categories, detector.image_size, detector.thresholds, "cpu")
        scores, maps = copy.infer(images)
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, err_msg="scores after saving and loading again")
        np.testing.assert_allclose(maps, expected_maps, rtol=1e-4, atol=1e-6, err_msg="maps after saving and loading again")

    def _round_trip(self, model: Any, config: TrainConfig, path: Path) -> Any:
        with quiet_libraries():
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_progress_bar=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                plugins=[AtomicCheckpointIO(extra_safe_globals=list(model.checkpoint_safe_globals()))],
            )
            trainer.strategy.connect(model)
            trainer.save_checkpoint(path)
        return self.item.load(path, config)

    def test_nothing_is_fetched(self, trained: Trained, fetched: list[str]) -> None:
        """With local weights, neither building nor training asks for a host; nor does opening the run, ever."""
        assert not trained.fetched, f"training with local weights asked for {', '.join(trained.fetched)}"
        del fetched[:]
        self.item.load(Run.open(trained.run).checkpoint, trained.config)
        assert not fetched, f"load() asked for {', '.join(fetched)}"
