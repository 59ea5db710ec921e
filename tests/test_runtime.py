"""Engines without torch: they agree with it, overlap their work, and survive what goes wrong."""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uad_plugins.deployment.bundle import Bundle, seal
from uad_plugins.deployment.manifest import InputSpec, OutputNames
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.imaging import ImageError
from uad_plugins.runtime import Detector
from uad_plugins.testing import RuntimeConformance
from uad_plugins.testing.common import check_detector

ROOT = Path(__file__).parents[1]
ENGINES = ["openvino", "onnxruntime"]


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of several sizes, modes and formats, and two that are none."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)

    def pixels(*shape, top=256, dtype=np.uint8):
        coarse = rng.integers(0, top, (shape[0] // 8 + 1, shape[1] // 8 + 1, *shape[2:]))
        return coarse.repeat(8, axis=0).repeat(8, axis=1)[: shape[0], : shape[1]].astype(dtype)

    images = {
        "large.png": Image.fromarray(pixels(300, 420, 3)),
        "small.png": Image.fromarray(pixels(20, 30, 3)),
        "exact.bmp": Image.fromarray(pixels(64, 64, 3)),
        "narrow.jpg": Image.fromarray(pixels(16, 500, 3)),
        "grey.png": Image.fromarray(pixels(90, 70)),
        "alpha.png": Image.fromarray(pixels(80, 80, 4)),
        "palette.png": Image.fromarray(pixels(100, 90, 3)).convert("P"),
        "deep.tiff": Image.fromarray(pixels(70, 90, top=65536, dtype=np.uint16)),
        "print.jpg": Image.fromarray(pixels(64, 96, 3)).convert("CMYK"),
        "web.webp": Image.fromarray(pixels(128, 64, 3)),
    }
    for name, image in images.items():
        image.save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    images["large.png"].save(folder / "turned.jpg", exif=turned)
    (folder / "broken.png").write_bytes((folder / "large.png").read_bytes()[:500])
    (folder / "text.png").write_text("no image")
    return sorted(str(path) for path in folder.iterdir())


def good(photos):
    return [path for path in photos if Path(path).name not in {"broken.png", "text.png"}]


@pytest.fixture(scope="module")
def expected(trained, photos):
    with open_detector(trained) as detector:
        return list(detector.stream(good(photos)))


@pytest.mark.parametrize(
    ("station", "engine"), [("bundle", "openvino"), ("onnx_bundle", "openvino"), ("onnx_bundle", "onnxruntime")]
)
@pytest.mark.parametrize("way", ["one by one", "stream"])
def test_engines_agree_with_torch(request, photos, expected, station, engine, way):
    with Detector(request.getfixturevalue(station), engine) as detector:
        paths = good(photos)
        results = list(detector.stream(paths)) if way == "stream" else [detector.predict(path) for path in paths]
    for found, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(found.score, wanted.score, rtol=1e-3)
        np.testing.assert_allclose(found.map, wanted.anomaly_map, rtol=1e-3, atol=1e-3 * float(wanted.anomaly_map.max()))
        assert found.size == wanted.size
        assert (found.verdict == "anomalous") == (wanted.score > found.threshold)


def test_an_image_is_the_same_whatever_holds_it(bundle, photos):
    with Detector(bundle) as detector:
        for path in good(photos):
            wanted = detector.predict(path)
            with Image.open(path) as image:
                assert detector.predict(image).score == wanted.score, path
            assert detector.predict(Path(path)).score == wanted.score
        with Image.open(photos[0]) as image:
            rgb = np.asarray(image.convert("RGB"))
        assert detector.predict(rgb).size == rgb.shape[:2]
        assert detector.predict(np.ascontiguousarray(rgb[..., 0])).score > 0
        results = list(detector.stream([rgb, photos[0], Image.fromarray(rgb)]))
        assert results[0].score == results[2].score


def test_a_category_has_its_own_threshold(bundle):
    grey = np.full((64, 64, 3), 128, np.uint8)
    with Detector(bundle) as detector:
        own, pooled = detector.predict(grey, category="washer"), detector.predict(grey)
        assert (own.threshold, pooled.threshold) == (detector.thresholds.of("washer"), detector.thresholds.of(None))
        assert pooled.threshold <= max(detector.thresholds.of(name) for name in detector.categories)
        with pytest.raises(UsageError, match="unknown category 'washr'"):
            detector.predict(grey, category="washr")
        with pytest.raises(UsageError, match="unknown category"):
            next(detector.stream([grey], category="washr"))


@pytest.mark.parametrize(("station", "engine"), [("bundle", "openvino"), ("onnx_bundle", "onnxruntime")])
def test_a_score_that_is_no_number_is_an_error_in_predict_and_in_a_stream(request, station, engine, monkeypatch):
    from uad_plugins.runtime.onnxruntime_detector import OnnxRuntimeDetector
    from uad_plugins.runtime.openvino_detector import _Request

    folder, nothing = request.getfixturevalue(station), (float("nan"), np.zeros((64, 64), np.float32))
    monkeypatch.setattr(_Request, "result", lambda self: nothing)
    monkeypatch.setattr(OnnxRuntimeDetector, "run", lambda self, image: nothing)
    grey = np.full((64, 64, 3), 128, np.uint8)
    with Detector(folder, engine) as detector:
        for result in (detector.predict(grey), *detector.stream([grey])):
            assert (result.verdict, result.error) == ("error", "the model's score is not a finite number")
            assert result.map is None


def test_without_a_threshold_there_is_no_verdict(bundle, products, tmp_path, capsys):
    """One behaviour at every station, and JSON that others can read."""
    from uadx.app import main

    folder = Path(shutil.copytree(bundle, tmp_path / "bare"))
    manifest = Bundle.open(folder).manifest
    unset = manifest.thresholds.model_copy(
        update={"pooled": manifest.thresholds.pooled.model_copy(update={"value": None}), "categories": {}}
    )
    seal(folder, manifest.model_copy(update={"thresholds": unset}))
    image = str(sorted((products / "washer" / "test" / "good").iterdir())[0])
    with Detector(folder) as detector:
        for result in (detector.predict(image, category="washer"), *detector.stream([image])):
            assert (result.verdict, result.threshold, result.error) == ("no threshold", None, "")

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, words)])
        assert not stopped.value.code
        return capsys.readouterr().out

    (row,) = json.loads(run("predict", folder, image, "--json"))["predictions"]
    assert (row["verdict"], row["threshold"]) == ("no threshold", None)
    assert run("predict", folder, image).startswith("no threshold ")
    report = json.loads(run("evaluate", folder, products, "--out", tmp_path / "out", "--json"))
    assert report["decisions"]["washer"] == {"threshold": None, "false_positive_rate": None, "true_positive_rate": None}


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), 7, None]
)
def test_what_is_no_image_is_refused(bundle, wrong):
    with Detector(bundle) as detector:
        with pytest.raises(ImageError, match="neither a path"):
            detector.predict(wrong)
        (result,) = detector.stream([wrong])
        assert result.verdict == "error"
        assert result.map is None


def test_a_stream_keeps_its_order_and_goes_on_after_bad_images(bundle, photos):
    paths = list(itertools.islice(itertools.cycle(photos), 61))
    with open_detector(bundle) as detector:
        for settings in ({}, {"batch_size": 1, "readers": 1}, {"batch_size": 3, "readers": 8}):
            found = list(detector.stream(iter(paths), **settings))
            assert [prediction.path for prediction in found] == paths
            bad = [prediction for prediction in found if prediction.error]
            assert {Path(prediction.path).name for prediction in bad} == {"broken.png", "text.png"}
            by_path = {}
            for prediction in found:
                score = by_path.setdefault(prediction.path, prediction.score)
                np.testing.assert_equal(score, prediction.score)
        assert list(detector.stream([])) == []


def test_a_stream_reads_no_further_ahead_than_it_was_told(bundle, photos):
    taken = []

    def endless():
        for path in itertools.cycle(good(photos)):
            taken.append(path)
            yield path

    with open_detector(bundle) as detector:
        stream = detector.stream(endless(), batch_size=4)
        for _ in range(10):
            next(stream)
        assert len(taken) < 10 + 4 + 2 * (os.cpu_count() or 1) + 2
        stream.close()
        # The requests that were in flight have landed: the next stream gets its own results.
        first = next(iter(detector.stream(photos[:1])))
        np.testing.assert_equal(first.score, next(iter(detector.stream(photos[:1]))).score)


def test_a_hung_queue_is_noticed_and_every_image_still_scored(bundle, photos, expected, monkeypatch):
    from uad_plugins.runtime.openvino_detector import OpenVinoDetector, _Request

    waited = []

    def hangs(self, seconds):
        waited.append(seconds)
        return False

    monkeypatch.setattr(_Request, "wait", hangs)
    monkeypatch.setattr(OpenVinoDetector, "patience", 0.5)
    with open_detector(bundle) as detector:
        with pytest.warns(RuntimeWarning, match="no result within 0.5 s") as warned:
            found = list(detector.stream(good(photos)))
        assert len(warned) == 1
        waits = len(waited)
        again = list(detector.stream(good(photos)))
    assert len(waited) == waits, "a queue that hung is not waited for again"
    for scored in (found, again):
        np.testing.assert_allclose([item.score for item in scored], [item.score for item in expected], rtol=1e-3)


def test_a_queue_that_hangs_in_the_middle_loses_and_doubles_nothing(bundle, photos, expected, monkeypatch):
    from uad_plugins.runtime.openvino_detector import OpenVinoDetector, _Request

    original, calls = _Request.wait, itertools.count()

    def hangs_later(self, seconds):
        return False if next(calls) > 8 else original(self, 60.0)

    monkeypatch.setattr(_Request, "wait", hangs_later)
    monkeypatch.setattr(OpenVinoDetector, "patience", 0.5)
    with open_detector(bundle) as detector, pytest.warns(RuntimeWarning, match="one image at a time"):
        found = list(detector.stream(photos))
    assert [item.path for item in found] == photos
    scores = [item.score for item in found if not item.error]
    np.testing.assert_allclose(scores, [item.score for item in expected], rtol=1e-3)


def test_a_finished_request_takes_the_next_image_while_the_oldest_is_under_way(bundle, photos, expected, monkeypatch):
    from uad_plugins.runtime.openvino_detector import _Request

    started, wait, start = [], _Request.wait, _Request.start
    requests = set()

    def noting(self, image):
        requests.add(self)
        started.append(self)
        start(self, image)

    def slow_first(self, seconds):
        # The first image lands when some request has taken its second one.
        if self is started[0] and len(started) == len(requests) and seconds < 10:
            time.sleep(seconds)
            return False
        return wait(self, 10.0 if seconds else 0)

    monkeypatch.setattr(_Request, "start", noting)
    monkeypatch.setattr(_Request, "wait", slow_first)
    paths = good(photos) * 3
    with open_detector(bundle) as detector:
        monkeypatch.setattr(type(detector), "patience", 5.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = list(detector.stream(paths))
    assert [item.path for item in found] == paths
    np.testing.assert_allclose([item.score for item in found], [item.score for item in expected] * 3, rtol=1e-3)


def test_results_that_wait_for_an_older_one_are_bounded(bundle, photos, monkeypatch):
    from uad_plugins.runtime import openvino_detector

    most, add = [], openvino_detector._Queue.add

    def noting(self, flight):
        add(self, flight)
        most.append(len(self.flying) / len(self.requests))

    monkeypatch.setattr(openvino_detector._Queue, "add", noting)
    with open_detector(bundle) as detector:
        bad = [path for path in photos if Path(path).name in {"broken.png", "text.png"}]
        list(detector.stream((good(photos)[:1] + bad * 20) * 3, batch_size=64))
    assert max(most) <= 2


def test_a_single_image_is_scored_in_latency_mode_and_several_share_requests(bundle, photos, monkeypatch):
    from uad_plugins.runtime.openvino_detector import LATENCY, THROUGHPUT, OpenVinoDetector, _Request

    hints, made, compile_model, new = [], [], OpenVinoDetector.compile, _Request.__init__

    def noting(self, hint):
        hints.append(hint)
        return compile_model(self, hint)

    def making(self, *arguments):
        made.append(self)
        new(self, *arguments)

    monkeypatch.setattr(OpenVinoDetector, "compile", noting)
    monkeypatch.setattr(_Request, "__init__", making)
    threads = lambda: {thread.name for thread in threading.enumerate() if thread.name.startswith("uadx-decoder")}  # noqa: E731
    before = threads()
    with open_detector(bundle) as detector:
        (one,) = detector.stream(good(photos)[:1])
        assert (hints, len(made), threads()) == ([LATENCY], 1, before)
        several = list(detector.stream(good(photos)[:3]))
        count = len(made)
        list(detector.stream(good(photos)[:3]))
        assert (hints, len(made)) == ([LATENCY, THROUGHPUT], count)
    assert one.score == pytest.approx(several[0].score, rel=1e-4)


def test_what_openvino_compiled_is_kept_in_the_cache_alone(bundle, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("UADX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with Detector(bundle) as detector:
        score = detector.predict(photos[0] if "broken" not in photos[0] else photos[1]).score
    (folder,) = (tmp_path / "cache" / "openvino").iterdir()
    kept = list(folder.iterdir())
    assert kept
    assert list((tmp_path / "here").iterdir()) == []
    for blob in kept:
        blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with Detector(bundle) as detector:
            assert detector.predict(photos[0] if "broken" not in photos[0] else photos[1]).score == pytest.approx(score)


def test_a_cache_that_cannot_be_written_is_done_without(bundle, photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UADX_CACHE", str(tmp_path / "file"))
    with Detector(bundle) as detector, pytest.warns(RuntimeWarning, match="cache is left unused"):
        assert detector.predict(good(photos)[0]).score > 0


def test_memory_does_not_grow(bundle, photos):
    """Ten times the images must not take more memory: three times 400 small ones, from the second on."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc")
    image = np.full((64, 64, 3), 90, np.uint8)
    with Detector(bundle) as detector:
        seen = []
        for _ in range(4):
            for _ in detector.stream(itertools.repeat(image, 400)):
                pass
            gc.collect()
            seen.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    # A result is 16 KB of map: 400 kept ones would be 6.5 MB.
    assert seen[3] - seen[1] < 5e6, seen


def test_nothing_of_torch_is_loaded(bundle, onnx_bundle, photos, tmp_path):
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "torchvision", "anomalib", "lightning", "timm", "nncf", "onnx"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from uad_plugins.runtime import Detector

for bundle in ({str(bundle)!r}, {str(onnx_bundle)!r}):
    with Detector(bundle) as detector:
        result = detector.predict({good(photos)[0]!r}, category="washer")
        assert result.score > 0 and result.map.shape == (64, 64), result
        assert len(list(detector.stream({good(photos)!r}))) == {len(good(photos))}
from uadx.app import main
main(["predict", {str(bundle)!r}, {good(photos)[0]!r}, "--out", {str(tmp_path / "out")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "predictions.csv").exists()


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


def test_without_a_gpu_the_next_engine_is_taken_unless_tensorrt_was_asked_for(jetson, photos):
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


def test_an_error_of_the_system_says_what_it_is(bundle, monkeypatch):
    def refusing(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refusing)
    with pytest.raises(UadxError) as caught:
        open_detector(bundle)
    assert "Permission denied" in caught.value.message
    assert str(bundle / "bundle.json") in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "station"), [("openvino-runtime", "bundle"), ("onnx-runtime", "onnx_bundle")])
def test_the_runtime_extras_bring_no_torch(request, photos, tmp_path, extra, station):
    """A clean environment with nothing but the extra runs a bundle; skipped where pip cannot install."""
    import venv

    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", ".venv", "*cache*"))
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    done = subprocess.run([*command, f"{source}[{extra}]"], capture_output=True, text=True, timeout=280)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install: {done.stderr.strip().splitlines()[-1]}")
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    assert not {line.partition("==")[0] for line in listed.splitlines()} & {"torch", "anomalib", "timm", "nncf", "onnx"}
    station = str(request.getfixturevalue(station))
    code = f"from uad_plugins.runtime import Detector\nprint(Detector({station!r}).predict({good(photos)[0]!r}).verdict)"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, env=clean)
    assert done.stdout.strip() in {"normal", "anomalous"}, done.stderr
