"""Engines without torch: they agree with it, overlap their work, and survive what goes wrong."""

import gc
import itertools
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

from uad_plugins.detector import open_detector
from uad_plugins.runtime import Detector

ROOT = Path(__file__).parents[1]


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


def test_a_stream_that_is_closed_while_requests_hang_keeps_them(bundle, photos, expected, monkeypatch):
    """To release a hung request means to wait for it: none goes back, and none is released."""
    from uad_plugins.runtime import openvino_detector

    started, waited, wait, start = [], [], openvino_detector._Request.wait, openvino_detector._Request.start

    def first_alone(self, seconds):
        waited.append(seconds)
        return self is started[0] and len(started) > 1 and wait(self, 60.0)

    monkeypatch.setattr(openvino_detector._Request, "start", lambda self, image: started.append(self) or start(self, image))
    monkeypatch.setattr(openvino_detector._Request, "wait", first_alone)
    monkeypatch.setattr(openvino_detector, "_ABANDONED", [])
    with open_detector(bundle) as detector:
        monkeypatch.setattr(detector, "patience", 0.5)
        stream = detector.stream(good(photos))
        next(stream)
        with pytest.warns(RuntimeWarning, match="no result within 0.5 s"):
            stream.close()
        waits = len(waited)
        assert set(started) <= set(openvino_detector._ABANDONED)
        again = list(detector.stream(good(photos)))
        assert len(waited) == waits, "a queue that hung is not waited for again"
        for request in openvino_detector._ABANDONED:
            wait(request, 60.0)
    np.testing.assert_allclose([item.score for item in again], [item.score for item in expected], rtol=1e-3)


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
    """More images must not take more memory: what keeps results grows with every 400 images, what settles does not."""
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
    # A result is 16 KB of map: 400 kept ones would be 6.5 MB each time. An allocator may take some more once.
    growth = [after - before for before, after in itertools.pairwise(seen)]
    assert min(growth) < 2e6, growth


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


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "station"), [("openvino-runtime", "bundle"), ("onnx-runtime", "onnx_bundle")])
def test_the_runtime_extras_bring_no_torch(request, photos, tmp_path, extra, station):
    """A clean environment with nothing but the extra runs a bundle; skipped where pip cannot install."""
    import venv

    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    aside = shutil.ignore_patterns(".git", ".venv", "*cache*", "results", "runs")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=aside)
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
