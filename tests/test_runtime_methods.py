"""Every method says the same as a bundle as it does as a run, whatever runs it."""

from pathlib import Path

import numpy as np
import pytest
from runs import small_run

from uad_plugins.deployment.deploy import Order, deploy
from uad_plugins.detector import open_detector


@pytest.fixture(scope="module")
def reverse(products, tmp_path_factory):
    """A run of Reverse Distillation. Not to be changed."""
    out = tmp_path_factory.mktemp("reverse") / "run"
    over = {"model": {"name": "reverse_distillation"}, "optimizer": {"name": "adam", "lr": 5e-3}}
    small_run(products, out, {**over, "trainer": {"max_epochs": 1}})
    return out


@pytest.mark.parametrize(
    ("target", "engines"),
    [("openvino-cpu", ["openvino"]), pytest.param("onnx", ["openvino", "onnxruntime"], marks=pytest.mark.slow)],
    ids=["openvino-cpu", "onnx"],
)
@pytest.mark.parametrize("method", ["reverse", "students"])
def test_engines_agree_with_torch(request, products, tmp_path, method, target, engines):
    run = request.getfixturevalue(method)
    paths = sorted(map(str, products.glob("*/test/*/*.png")))
    assert len(paths) == 24
    with open_detector(run) as detector:
        assert detector.engine == "torch"
        expected = list(detector.stream(paths))
    assert deploy(Order(run, tmp_path / "bundle", target, pictures=False)).precision == "fp32"
    for engine in engines:
        with open_detector(tmp_path / "bundle", engine) as detector:
            check(detector.stream(paths), expected, f"{target} by {engine}")


def check(found, expected, what):
    """Hold predictions to those of torch."""
    for one, wanted in zip(found, expected, strict=True):
        case = f"{what}: {Path(wanted.path).name}"
        largest = float(np.abs(wanted.anomaly_map).max())
        np.testing.assert_allclose(one.score, wanted.score, rtol=1e-3, err_msg=case)
        np.testing.assert_allclose(one.anomaly_map, wanted.anomaly_map, rtol=1e-3, atol=1e-3 * largest, err_msg=case)
