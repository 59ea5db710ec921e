"""Calibration images whose activations reach far beyond those of all others are left out."""

import numpy as np
import pytest
import torch
from networks import calibration, core
from PIL import Image

from uad_plugins.data.layouts import scan
from uad_plugins.quantization.outliers import outlying, without_outliers

REACHES = np.random.default_rng(0).uniform(1, 1.5, (40, 3))


def test_what_reaches_more_than_twice_as_far_anywhere_is_outlying():
    reaches = REACHES.copy()
    reaches[7, 1], reaches[30, 2] = 4.0, 9.0
    assert outlying(reaches) == [7, 30]
    reaches[7, 1] = 2.5
    assert outlying(reaches) == [30]


def test_many_that_reach_far_are_no_outliers():
    reaches = REACHES.copy()
    reaches[:4] = 9.0
    assert outlying(reaches) == []


def test_a_few_samples_tell_nothing():
    reaches = np.ones((10, 3))
    reaches[0] = 100.0
    assert outlying(reaches) == []


@pytest.fixture
def images(mvtec, tmp_path):
    """A faint product, 80 images and one of them strong; and a strong one with two images."""
    rng = np.random.default_rng(0)
    for name, count, strong in (("faint", 80, {11}), ("strong", 2, {0, 1})):
        mvtec(tmp_path, name, train=count)
        for number in range(count):
            pixels = 124 + rng.normal(0, 80 if number in strong else 3, (64, 64, 3))
            path = tmp_path / name / "train" / "good" / f"{number:03d}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return scan(tmp_path)


def test_an_odd_image_is_left_out_and_a_product_of_odd_images_is_not(images):
    chosen = calibration(images, samples=82)
    assert chosen.record["left_out"] == []
    network = core("stfpm")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rest = without_outliers(network, chosen, images)
    assert rest.record["left_out"] == ["faint/train/good/011.png"]
    assert (len(rest), rest.record["samples"], rest.record["images"]) == (81, 81, {"faint": 79, "strong": 2})
    assert rest.record["images_sha256"] not in {None, chosen.record["images_sha256"]}
    assert not any(path.endswith("faint/train/good/011.png") for path in rest.paths)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any("nncf" in name for name, _ in network.named_modules())


def test_noise_has_no_outliers(images):
    chosen = calibration(images, "random-normal", 30)
    assert without_outliers(core("stfpm"), chosen, images) is chosen
