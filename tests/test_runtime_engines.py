"""Each engine by itself: it conforms, OpenVINO enlarges by products, and TensorRT needs a device."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from uad_plugins.deployment.bundle import Bundle, seal
from uad_plugins.deployment.manifest import InputSpec, OutputNames
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError
from uad_plugins.testing import RuntimeConformance
from uad_plugins.testing.common import check_detector


class TestOpenVino(RuntimeConformance):
    plugin = "openvino"

    @pytest.fixture
    def station(self, bundle):
        return bundle


class TestOnnxRuntime(RuntimeConformance):
    plugin = "onnxruntime"

    @pytest.fixture
    def station(self, onnx_bundle):
        return onnx_bundle


class TestTensorRt(RuntimeConformance):
    plugin = "tensorrt"


def test_an_engine_that_is_not_installed_says_how_to_install_it(bundle, onnx_bundle, monkeypatch):
    for name in ("uad_plugins.runtime.openvino_detector", "uad_plugins.runtime.graph"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UadxError, match="an engine for it is not installed") as caught:
        open_detector(bundle)
    assert "uadx[openvino-runtime]" in caught.value.hint
    with pytest.raises(UadxError, match="the engine 'openvino' is not installed"):
        open_detector(bundle, "openvino")
    with open_detector(onnx_bundle) as detector:
        assert detector.engine == "onnxruntime"
    with pytest.raises(UadxError, match="the engine 'torch' does not run it"):
        open_detector(bundle, "torch")


@pytest.mark.parametrize("mode", ["half_pixel", "align_corners"])
@pytest.mark.parametrize(("before", "after"), [((16, 16), (64, 64)), ((7, 5), (30, 64)), ((1, 3), (5, 9)), ((8, 8), (8, 8))])
def test_enlarging_by_products_is_bilinear_resizing(mode, before, after):
    import openvino
    from openvino import opset13

    from uad_plugins.runtime.graph import multiply_instead_of_resizing

    def model():
        source = opset13.parameter([1, 1, *before], openvino.Type.f32, name="map")
        sizes = opset13.constant(np.array(after, np.int64))
        axes = opset13.constant(np.array([2, 3], np.int64))
        enlarged = opset13.interpolate(source, sizes, "linear_onnx", "sizes", coordinate_transformation_mode=mode, axes=axes)
        return openvino.Model([opset13.result(enlarged)], [source], "resize")

    def run(subject, values):
        return openvino.Core().compile_model(subject, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values])[0]

    values = np.random.default_rng(0).random((1, 1, *before), dtype=np.float32)
    rewritten = model()
    assert multiply_instead_of_resizing(rewritten) == 1
    assert "Interpolate" not in {node.get_type_name() for node in rewritten.get_ops()}
    np.testing.assert_allclose(run(rewritten, values), run(model(), values), rtol=1e-5, atol=1e-7)


def test_other_resizing_stays_as_it_is():
    import openvino
    from openvino import opset13

    from uad_plugins.runtime.graph import multiply_instead_of_resizing

    for shape, target, mode in (
        ((1, 4, 8, 8), (16, 16), "linear_onnx"),
        ((1, 1, 8, 8), (4, 4), "linear_onnx"),
        ((1, 1, 8, 8), (16, 16), "nearest"),
    ):
        source = opset13.parameter(list(shape), openvino.Type.f32)
        arguments = (opset13.constant(np.array(target, np.int64)), mode, "sizes")
        resized = opset13.interpolate(source, *arguments, axes=opset13.constant(np.array([2, 3], np.int64)))
        assert multiply_instead_of_resizing(openvino.Model([opset13.result(resized)], [source], "resize")) == 0


def filtered(weight, size=(20, 27), pads=((0, 0), (0, 0)), strides=(1, 1)):
    """A model of a single convolution."""
    import openvino
    from openvino import opset13

    source = opset13.parameter([1, weight.shape[1], *size], openvino.Type.f32, name="map")
    kernel = opset13.constant(weight.astype(np.float32))
    result = opset13.convolution(source, kernel, list(strides), *(list(each) for each in pads), [1, 1])
    return openvino.Model([opset13.result(result)], [source], "filter")


def gaussian(rows, columns):
    values = [np.exp(-((np.arange(n) - n // 2 + 0.2) ** 2) / 4) for n in (rows, columns)]
    return np.outer(*values)[None, None]


@pytest.mark.parametrize("pads", [((0, 0), (0, 0)), ((4, 2), (4, 2)), ((1, 0), (0, 3))])
@pytest.mark.parametrize("shape", [(9, 5), (3, 11)])
def test_filtering_by_products_is_a_separable_convolution(shape, pads):
    import openvino

    from uad_plugins.runtime.graph import multiply_instead_of_filtering

    def run(subject):
        return openvino.Core().compile_model(subject, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values])[0]

    values = np.random.default_rng(0).random((1, 1, 20, 27), dtype=np.float32)
    rewritten = filtered(gaussian(*shape), pads=pads)
    assert multiply_instead_of_filtering(rewritten) == 1
    assert "Convolution" not in {node.get_type_name() for node in rewritten.get_ops()}
    np.testing.assert_allclose(run(rewritten), run(filtered(gaussian(*shape), pads=pads)), rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "strides"),
    [
        (np.random.default_rng(0).random((1, 1, 3, 3)), (1, 1)),
        (np.repeat(gaussian(3, 3), 4, axis=1), (1, 1)),
        (np.repeat(gaussian(3, 3), 4, axis=0), (1, 1)),
        (gaussian(3, 3), (2, 2)),
    ],
    ids=["not separable", "channels in", "channels out", "strided"],
)
def test_other_filters_stay_as_they_are(weight, strides):
    from uad_plugins.runtime.graph import multiply_instead_of_filtering

    assert multiply_instead_of_filtering(filtered(weight, strides=strides)) == 0


def test_a_map_is_enlarged_by_products_in_a_bundle(bundle):
    import openvino

    kinds = [node.get_type_name() for node in openvino.Core().read_model(bundle / "model.xml").get_ops()]
    assert "Interpolate" not in kinds
    assert kinds.count("MatMul") == 6


@pytest.mark.parametrize("version", ["8.6", "10.3", "11.4"])
def test_tensorrt_runs_a_bundle_for_jetson(bundle, tmp_path, monkeypatch, version):
    from jetson_device import SIZE, TENSORS, Device

    manifest = Bundle.open(bundle).manifest
    folder = tmp_path / "jetson"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"onnx")
    changes = {
        "target": "tensorrt-jetson",
        "onnx": "model.onnx",
        "openvino": None,
        "input": InputSpec(name="input", shape=TENSORS["input"], dtype="float32", layout="NCHW"),
        "outputs": OutputNames(score="score", map="map"),
    }
    manifest = seal(folder, manifest.model_copy(update=changes))
    device = Device(version, folder, tensors={**TENSORS, "map": (1, *SIZE)})
    monkeypatch.delitem(sys.modules, "uad_plugins.runtime.tensorrt_detector", raising=False)
    images = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3)).astype(np.uint8)
    with device.installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with open_detector(folder, "tensorrt") as detector:
            scores, maps = detector.infer(images)
            check_detector(detector, [images[0], images[1], images[2]])
    mean, std = manifest.preprocessing.mean, manifest.preprocessing.std
    wanted = ((images / 255 - mean) / std).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    np.testing.assert_allclose(maps[:, 0, 0], wanted, rtol=1e-5)
    assert (folder / "engine" / "model.engine").exists()
    Bundle.open(folder)
    sys.modules.pop("uad_plugins.runtime.tensorrt_detector", None)


@pytest.fixture
def jetson(onnx_bundle, tmp_path, monkeypatch):
    """A bundle for Jetson that OpenVINO can run too, and a device with TensorRT that has not seen it yet."""
    from jetson_device import Device

    folder = Path(shutil.copytree(onnx_bundle, tmp_path / "jetson"))
    manifest = Bundle.open(folder).manifest
    seal(folder, manifest.model_copy(update={"target": "tensorrt-jetson"}))
    names = manifest.outputs
    shapes = {manifest.input.name: (1, 3, 64, 64), names.score: (1,), names.map: (1, 64, 64)}
    device = Device("10.3", folder, tensors=shapes)
    monkeypatch.delitem(sys.modules, "uad_plugins.runtime.tensorrt_detector", raising=False)
    with device.installed():
        yield device
    sys.modules.pop("uad_plugins.runtime.tensorrt_detector", None)


def test_without_a_gpu_the_next_engine_is_taken_unless_tensorrt_was_asked_for(jetson):
    jetson.cuda.fails = True
    reason = f"{jetson.bundle}: CUDA: cuInit failed: no CUDA-capable device is detected"
    with pytest.warns(RuntimeWarning) as warned, open_detector(jetson.bundle) as detector:
        assert detector.engine == "openvino"
    assert [str(warning.message) for warning in warned] == [f"{reason}; going on with openvino"]
    with pytest.raises(UadxError) as caught:
        open_detector(jetson.bundle, "tensorrt")
    assert caught.value.message == reason


@pytest.mark.filterwarnings("ignore:building the engine:UserWarning")
@pytest.mark.filterwarnings("ignore:engine:UserWarning")
@pytest.mark.filterwarnings("ignore:the same with trtexec:UserWarning")
def test_errors_of_cuda_are_told_and_no_context_is_left(jetson, monkeypatch):
    def failing(*_):
        raise jetson.cuda.Error("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(jetson.cuda, "mem_alloc", failing)
        with pytest.raises(UadxError, match="CUDA: out of memory"):
            open_detector(jetson.bundle, "tensorrt")
    assert (jetson.cuda.contexts, jetson.cuda.memory) == (0, {})
    detector = open_detector(jetson.bundle, "tensorrt")
    with monkeypatch.context() as patched:
        patched.setattr(jetson.cuda, "memcpy_htod_async", failing)
        with pytest.raises(UadxError, match="CUDA: out of memory"):
            detector.infer(np.zeros((1, 64, 64, 3), np.uint8))
    detector.close()
    assert (jetson.cuda.contexts, jetson.cuda.memory) == (0, {})


@pytest.fixture
def sealed_off(monkeypatch):
    """Make folders that may not be written, also by root: ``sealed_off(path)``."""
    refused, access = set(), os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: Path(path) not in refused and access(path, mode, **more))
    return refused.add


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_engine_folder_that_cannot_be_written_is_taken_while_its_engine_fits(jetson, sealed_off, tmp_path, monkeypatch):
    monkeypatch.setenv("UADX_CACHE", str(tmp_path / "cache"))
    beside, built = jetson.bundle / "engine", lambda: len(jetson.trt.called("Builder.build_serialized_network"))
    open_detector(jetson.bundle, "tensorrt").close()
    before = {path.name: path.read_bytes() for path in beside.iterdir()}
    sealed_off(beside)
    open_detector(jetson.bundle, "tensorrt").close()
    assert built() == 1
    jetson.cuda.name = "Xavier"
    for _ in range(2):
        open_detector(jetson.bundle, "tensorrt").close()
        assert built() == 2
    assert {path.name: path.read_bytes() for path in beside.iterdir()} == before
    (cached,) = (tmp_path / "cache" / "tensorrt").glob("*/model.engine")
    assert cached.parent.name == Bundle.open(jetson.bundle).manifest.seal


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_files_of_a_bundle_are_hashed_once(jetson, monkeypatch):
    open_detector(jetson.bundle, "tensorrt").close()
    opened, opening = [], Path.open

    def noting(self, *arguments, **more):
        opened.append(self.name)
        return opening(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", noting)
    open_detector(jetson.bundle, "tensorrt").close()
    assert opened.count("model.onnx") == 1


def test_an_error_of_the_system_says_what_it_is(bundle, monkeypatch):
    def refusing(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refusing)
    with pytest.raises(UadxError) as caught:
        open_detector(bundle)
    assert "Permission denied" in caught.value.message
    assert str(bundle / "bundle.json") in caught.value.message
