"""Pictures and data sets that the tests share."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jetson_device import VERSIONS, Device, write_bundle
from PIL import Image
from uadx.app import main

from uad_plugins.data.products.synthesis import synthesize
from uad_plugins.training.signals import child_signal_restored

SIZE = (20, 16)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests, and the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("UADX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic products, small: 10 training images of each, 4 good and 4 defective test images. Not to be changed."""
    return synthesize(tmp_path_factory.mktemp("synthetic") / "products", side=64, train=10, test=4)


@pytest.fixture(autouse=True)
def _no_handler_left_behind() -> Iterator[None]:
    """Data loaders with workers leave a handler behind: see ``uad_plugins.training.signals``."""
    with child_signal_restored():
        yield


def _picture(path: Path, seed: str | None = None, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is the seed, so that no two pictures of a test are alike unless it asks for it.
    rng = np.random.default_rng(zlib.crc32((seed or path.as_posix()).encode()))
    pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _mask(path: Path, marked: bool = True, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[2:6, 3:9] = 255 * marked
    Image.fromarray(pixels).save(path)
    return path


def _mvtec(root: Path, category: str, train: int = 4, good: int = 2, bad: int = 2, masks: bool = True) -> Path:
    for number in range(train):
        _picture(root / category / "train" / "good" / f"{number:03d}.png")
    for number in range(good):
        _picture(root / category / "test" / "good" / f"{number:03d}.png")
    for number in range(bad):
        _picture(root / category / "test" / "crack" / f"{number:03d}.png")
        if masks:
            _mask(root / category / "ground_truth" / "crack" / f"{number:03d}_mask.png")
    return root


@pytest.fixture
def uadx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return exit status, stdout and stderr."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Make a folder that may not be listed, also by root: ``closed(path)``."""
    refused: set[str] = set()
    scandir = os.scandir

    def listing(path: Any = ".") -> Any:
        # Python removes folders by descriptors, which are numbers.
        if not isinstance(path, int) and os.fspath(path) in refused:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    def close(path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        refused.add(str(path))
        return path

    monkeypatch.setattr(os, "scandir", listing)
    return close


@pytest.fixture(scope="session")
def picture() -> Callable[..., Path]:
    """Write a picture of noise: ``picture(path, seed=None, size=(width, height))``."""
    return _picture


@pytest.fixture(scope="session")
def mask() -> Callable[..., Path]:
    """Write a mask: ``mask(path, marked=True, size=(width, height))``."""
    return _mask


@pytest.fixture(scope="session")
def mvtec() -> Callable[..., Path]:
    """Write one category in MVTec layout: ``mvtec(root, category, train=4, good=2, bad=2, masks=True)``."""
    return _mvtec


@pytest.fixture(scope="session")
def trained(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STFPM on the products, trained for two epochs at 64 pixels. Not to be changed."""
    from runs import small_run

    out = tmp_path_factory.mktemp("runs") / "stfpm"
    small_run(products, out)
    return out


@pytest.fixture(scope="session")
def small(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STFPM on two layers. Not to be changed."""
    from runs import small_run

    out = tmp_path_factory.mktemp("small") / "run"
    small_run(products, out, {"model": {"layers": ["layer1", "layer2"]}})
    return out


@pytest.fixture(scope="session")
def students(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Uninformed Students on two scales. Not to be changed."""
    from runs import over, small_run

    out = tmp_path_factory.mktemp("students") / "run"
    small_run(products, out, over())
    return out


@pytest.fixture(scope="session")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run deployed for OpenVINO. Not to be changed."""
    return _deployed(trained, tmp_path_factory.mktemp("bundles") / "openvino", "openvino-cpu")


@pytest.fixture(scope="session")
def onnx_bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run deployed as ONNX. Not to be changed."""
    return _deployed(trained, tmp_path_factory.mktemp("bundles") / "onnx", "onnx")


def _deployed(run: Path, out: Path, target: str) -> Path:
    from uad_plugins.deployment.deploy import Order, deploy

    deploy(Order(run, out, target))
    return out


@pytest.fixture(params=VERSIONS)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Device:
    """A Jetson with each version of TensorRT, and a bundle for it."""
    return Device(request.param, write_bundle(tmp_path / "bundle"))
