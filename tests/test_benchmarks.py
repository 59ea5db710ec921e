"""What the benchmarks measure, without measuring: the clock covers the whole stream, and everything alternates."""

import importlib.util
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runtime():
    """The benchmark of the runtime, as a module."""
    spec = importlib.util.spec_from_file_location("runtime_benchmark", ROOT / "benchmarks" / "runtime.py")
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
