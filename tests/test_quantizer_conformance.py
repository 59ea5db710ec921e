"""The built-in backends and engines pass the checks that plugins of third parties are given."""

import pytest

from uad_plugins.testing import QuantizerConformance, RuntimeConformance


class TestOpenvinoInt8(QuantizerConformance):
    plugin = "openvino-int8"


class TestTensorrtInt8(QuantizerConformance):
    plugin = "tensorrt-int8"


class TestNncfQat(QuantizerConformance):
    plugin = "nncf-qat"
    options = {"epochs": 1, "accelerator": "cpu"}  # noqa: RUF012


class TestFp16(QuantizerConformance):
    plugin = "fp16"


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    from uad_plugins.quantization.quantize import Order, quantize

    out = tmp_path_factory.mktemp("exported") / "q"
    quantize(Order(trained, out, "fp32"))
    return out


class TestOpenvino(RuntimeConformance):
    plugin = "openvino"

    @pytest.fixture
    def station(self, exported):
        return exported


class TestOnnxRuntime(RuntimeConformance):
    plugin = "onnxruntime"

    @pytest.fixture
    def station(self, exported):
        return exported
