"""The benchmarks: what they measure, and that a failure in one run does not stop the next."""

import contextlib
import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from uad_plugins.detector import Detector, decode
from uad_plugins.models.backbones import BUNDLED_FILE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_quantization_is_measured_and_a_broken_run_does_not_stop_the_others(trained, products, tmp_path):
    (tmp_path / "broken").mkdir()
    words = [sys.executable, str(BENCHMARKS / "quantization.py"), str(tmp_path / "broken"), str(trained)]
    words += ["--data", str(products), "--out", str(tmp_path / "q.jsonl"), "--work", str(tmp_path / "work")]
    words += ["--backends", "fp32", "openvino-int8", "--calibrations", "dataset", "--samples", "3"]
    words += ["--threads", "1", "--rounds", "2", "--isa", "AVX512_CORE"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"failed: {tmp_path / 'broken'}"
    lines = {line["key"]: line for line in map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())}
    name = trained.name
    assert set(lines) == {
        f"{name}/torch",
        f"{name}/fp32/dataset",
        f"{name}/openvino-int8/dataset",
        f"{name}/latency/1",
        f"{name}/latency/1/AVX512_CORE",
    }
    for key, isa in ((f"{name}/latency/1", "all"), (f"{name}/latency/1/AVX512_CORE", "AVX512_CORE")):
        line = lines[key]
        assert line["isa"] == isa
        assert set(line["latency"]) == {"fp32 openvino", "fp32 onnxruntime", "openvino-int8 openvino"}
        kernels = line["executed"]["openvino-int8 openvino"]["convolutions"]
        assert sum(count for kernel, count in kernels.items() if kernel.lower().endswith("_i8")) > 0
        assert all(kernel.endswith("_f32") for kernel in line["executed"]["fp32 openvino"]["convolutions"])
        shares = line["executed"]["openvino-int8 openvino"]["share_of_time"]
        assert "Convolution i8" in shares
        assert "Convolution f32" not in shares
        assert 0.9 < sum(line["executed"]["fp32 openvino"]["share_of_time"].values()) < 1.01
    kernels = lines[f"{name}/latency/1/AVX512_CORE"]["executed"]["openvino-int8 openvino"]["convolutions"]
    assert not any("vnni" in kernel or "amx" in kernel for kernel in kernels)


def test_the_lowest_bar_of_any_column_is_seen(tmp_path, monkeypatch):
    """The axes of a row are shared: the limits of the last column must not cut off what collapsed in the first."""
    import matplotlib.pyplot as plt

    def lines(method, *values):
        for backend, value in zip(("torch", "openvino-int8"), values, strict=True):
            yield {"kind": "accuracy", "method": method, "backend": backend, "metrics": {"mean": {"image_auroc": value}}}

    results = tmp_path / "q.jsonl"
    results.write_text("\n".join(map(json.dumps, [*lines("a", 0.95, 0.5), *lines("b", 0.99, 0.98)])))
    monkeypatch.setattr(sys, "argv", ["plot", str(results), str(tmp_path / "q.png")])
    runpy.run_path(str(BENCHMARKS / "plot_quantization.py"), run_name="__main__")
    figure = plt.gcf()
    assert (tmp_path / "q.png").is_file()
    assert {axis.get_ylim() for axis in figure.axes[:2]} == {(0.45, 1.0)}
    plt.close(figure)


@pytest.fixture
def runtime():
    """The benchmark of the runtime, as a module."""
    spec = importlib.util.spec_from_file_location("runtime_benchmark", BENCHMARKS / "runtime.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_clock_of_the_throughput_covers_all_of_a_stream_after_another_was_drained(runtime, monkeypatch):
    clock, events = [0.0], []

    class Detector:
        def __init__(self, bundle):
            self.streams = 0

        def stream(self, files):
            self.streams += 1
            number, files = self.streams, list(files)
            # Nothing comes out before the pipeline is filled.
            clock[0] += 8.0
            for _ in files:
                clock[0] += 1.0
                yield None
            events.append((number, len(files)))

    monkeypatch.setattr("uad_plugins.runtime.Detector", Detector)
    monkeypatch.setattr(runtime, "files_of", lambda folder, count: [folder] * count)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: clock[0])
    found = runtime.throughput("bundle", "folder", 10)
    assert found["images_per_s"] == pytest.approx(10 / 18)
    assert found["between_results"]["p50_ms"] == 1000
    assert events == [(1, runtime.WARM_UP), (2, 10)]


@pytest.mark.parametrize(("count", "looks"), [(1, 1), (19, 19), (20, 20), (50, 25), (1000, 20)])
def test_a_soak_of_any_length_is_measured(runtime, monkeypatch, count, looks):
    class Detector(contextlib.nullcontext):
        def stream(self, files):
            return iter(files)

    monkeypatch.setattr("uad_plugins.runtime.Detector", lambda bundle: Detector(Detector()))
    monkeypatch.setattr(runtime, "files_of", lambda folder, count: [folder] * count)
    found = runtime.soak("bundle", "folder", count)
    assert (found["images"], len(found["rss_mb"])) == (count, looks)


def test_openvinos_own_benchmark_takes_its_turn_in_every_repeat(runtime, monkeypatch, tmp_path):
    ran = []

    def part(name, *_):
        ran.append(name)
        return {"images_per_s": 10.0, "p50_ms": 1.0, "mean_ms": 1.0}

    def app(bundle, hint, seconds):
        ran.append(f"benchmark_app {hint}")
        return {"images_per_s": float(len(ran)), "p50_ms": 1.0}

    monkeypatch.setattr("uad_plugins.deployment.deploy.deploy", lambda order: None)
    monkeypatch.setattr(runtime, "part", part)
    monkeypatch.setattr(runtime, "benchmark_app", app)
    arguments = Namespace(model="run", quantized=None, no_peer=True, repeats=3, folder="f", images=5, seconds=1, soak=0)
    report = runtime.measure(arguments, tmp_path)
    assert [ran.count(f"benchmark_app {hint}") for hint in ("throughput", "latency")] == [3, 3]
    places = [index for index, name in enumerate(ran) if name == "benchmark_app throughput"]
    # The second repeat runs backwards.
    assert [ran[first:last].count("throughput") for first, last in pairwise(places)] == [0, 2]
    assert report["fp32 benchmark_app throughput"]["images_per_s"] == sorted(place + 1 for place in places)[1]
    assert "fp32 throughput / benchmark_app" in report["ratios"]


@pytest.mark.slow
def test_trainings_are_timed_beside_anomalibs(products):
    words = [sys.executable, str(BENCHMARKS / "train_speed.py"), str(products), "--image-size", "64"]
    words += ["--epochs", "1", "--batch-size", "8", "--repeats", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    # The same work: the images that are left where one of ten is held out.
    counts = [line.partition(" s for ")[2].split()[0] for line in done.stdout.splitlines() if " s for " in line]
    assert counts == ["27", "27"]
    assert float(done.stdout.splitlines()[-1].removeprefix("uadx / anomalib: ").split()[0]) > 0


@pytest.mark.slow
def test_accuracy_is_measured_beside_anomalibs_and_of_no_other_data_again(products, tmp_path):
    words = [sys.executable, str(BENCHMARKS / "accuracy.py"), str(products), "--weights", str(BUNDLED_FILE)]
    words += ["--image-size", "64", "--epochs", "1", "--seeds", "0", "--out", str(tmp_path / "out")]
    words += ["--settings", "unified"]
    log = tmp_path / "out" / "accuracy.jsonl"
    for again in range(2):
        done = subprocess.run(words, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        rows = list(map(json.loads, log.read_text().splitlines()))
        assert len(rows) == 2, again
        assert [sorted(row["categories"]) for row in rows] == [["connector", "fabric", "washer"]] * 2
    # Of other images nothing was measured yet.
    data = shutil.copytree(products, tmp_path / "data")
    next((data / "fabric" / "train" / "good").iterdir()).unlink()
    words[2] = str(data)
    done = subprocess.run([*words, "--by", "uadx"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert len(log.read_text().splitlines()) == 3


def test_recipes_are_judged_by_defects_in_held_out_parts(trained, products):
    words = [sys.executable, str(BENCHMARKS / "held_out_defects.py"), str(trained), "--data", str(products), "--each", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    names = sorted(folder.name for folder in products.iterdir() if folder.is_dir())
    assert sorted(line["categories"]) == names
    for aurocs in (line["categories"], line["kinds"]):
        assert all(0 <= auroc <= 1 for auroc in aurocs.values())
        assert line["mean"] == pytest.approx(sum(aurocs.values()) / len(aurocs))


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, 0.0)])
def test_the_part_as_it_was_is_the_good_one(trained, products, sign, expected):
    measure = runpy.run_path(str(BENCHMARKS / "held_out_defects.py"))["measure"]

    class Sharp(Detector):
        """Scores what differs from the first image of a batch."""

        categories, image_size = ["washer"], (64, 64)

        def infer(self, images):
            change = np.abs(images.astype(np.float32) - images[0]).mean(axis=3)
            return sign * change.mean(axis=(1, 2)), change

    measure.__globals__["open_detector"] = lambda folder: Sharp()
    assert measure(trained, str(products), 1)["mean"] == expected


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("kind", ["scratch", "stain", "blur", "hole", "shade", "misplaced", "piece"])
def test_defects_are_drawn_everywhere_in_a_part(kind, shape):
    spoil = runpy.run_path(str(BENCHMARKS / "held_out_defects.py"))["spoil"]
    rng = np.random.default_rng(1)
    part = rng.integers(60, 180, (*shape, 3), dtype=np.uint8)
    other = rng.integers(180, 250, (*shape, 3), dtype=np.uint8)
    quadrants = set()
    for _ in range(40):
        change = np.abs(spoil(rng, part, kind, other).astype(float) - part).sum(axis=-1)
        assert change.any()
        centre = [np.average(np.arange(length), weights=change.sum(axis=1 - side)) for side, length in enumerate(shape)]
        quadrants.add(tuple(place < length / 2 for place, length in zip(centre, shape, strict=True)))
    assert len(quadrants) == 4


def test_pieces_come_from_other_products(trained, products):
    measure, asked = runpy.run_path(str(BENCHMARKS / "held_out_defects.py"))["measure"], []
    spoil = measure.__globals__["spoil"]

    def spy(rng, image, kind, other):
        asked.append(other)
        return spoil(rng, image, kind, other)

    measure.__globals__["spoil"] = spy
    found = measure(trained, str(products), 1)
    names = sorted(found["categories"])
    each = len(asked) // len(names)
    for number, name in enumerate(names):
        own = [decode(path, (64, 64)).pixels for path in (products / name / "train").rglob("*.png")]
        others = asked[number * each : (number + 1) * each]
        assert own
        assert not any(np.array_equal(other, one) for other in others for one in own)


def test_large_scores_are_told_apart():
    auroc = runpy.run_path(str(BENCHMARKS / "held_out_defects.py"))["auroc"]
    assert auroc([20.0, 21.0], [38.0, 39.0]) == 1


def test_pieces_are_of_the_other_product():
    spoil = runpy.run_path(str(BENCHMARKS / "held_out_defects.py"))["spoil"]
    rng = np.random.default_rng(1)
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert spoil(rng, black, "piece", white).max() > 50
    assert np.array_equal(spoil(rng, black, "piece", black), black)
    assert np.array_equal(spoil(rng, black, "misplaced", white), black)
