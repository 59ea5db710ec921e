"""AUROC, size and latency of runs by backend and calibration, as JSON lines; what is there already is not measured again.

    python benchmarks/quantization.py RUN... --data DATA --out results/quantization.jsonl

A line is an ``accuracy`` of one run, backend and calibration, or a ``latency`` of one run: all its results measured in the
same process in turn (one image each, over and over), so that what else the machine does hits all of them alike. A latency
says too what OpenVINO executed: the precision of the convolutions, and the share of time by type of layer.

``--isa AVX512_CORE`` measures the latency once more in a process whose OpenVINO takes newer instructions (VNNI, AMX) for
absent; ONNX Runtime does not ask. ``--extra`` adds rows of quantization-aware training and of wider noise (see ``EXTRA``).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import openvino

from uad_plugins.artifacts import read_json
from uad_plugins.cpu import cpu_flags
from uad_plugins.data.layouts import scan
from uad_plugins.detector import open_detector
from uad_plugins.doctor import machine
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.evaluate import evaluate
from uad_plugins.evaluation.thresholds import NO_THRESHOLDS
from uad_plugins.quantization.quantize import Order, quantize
from uad_plugins.quantized import Quantized
from uad_plugins.runtime.graph import prepare, read

BACKENDS = ["fp32", "fp16", "openvino-int8", "tensorrt-int8", "nncf-qat"]
METRICS = ("image_auroc", "pixel_auroc", "aupro")
ISA = "ONEDNN_MAX_CPU_ISA"
WARM_UP = 5


@dataclass(frozen=True)
class Row:
    """What is measured of a run.

    Attributes:
        name: Of the row.
        backend: What quantizes it.
        calibration: Its source.
        options: Of the backend.
        source: Name of the row whose result is exported; empty for the run itself.
        noise_std: Standard deviation of noise that calibrates.
    """

    name: str
    backend: str
    calibration: str
    options: dict = field(default_factory=dict)
    source: str = ""
    noise_std: float = 1.0

    @property
    def folder(self):
        return f"{self.name}-{self.calibration}"


EXTRA = [
    Row("qat-student", "nncf-qat", "dataset", {"scope": "student"}),
    Row("qat-tensorrt", "nncf-qat", "dataset", {"profile": "tensorrt"}),
    Row("qat-tensorrt-exported", "tensorrt-int8", "dataset", source="qat-tensorrt"),
    Row("qat-random-normal", "nncf-qat", "random-normal"),
    Row("openvino-wide-noise", "openvino-int8", "random-normal", noise_std=2.0),
    Row("tensorrt-wide-noise", "tensorrt-int8", "random-normal", noise_std=2.0),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True, help="labelled data of the runs")
    parser.add_argument("--out", type=Path, default=Path("results/quantization.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("results/quantized"), help="folder for the quantized models")
    parser.add_argument("--backends", nargs="*", default=BACKENDS)
    parser.add_argument("--extra", nargs="*", default=[], choices=[row.name for row in EXTRA], help="further rows")
    parser.add_argument("--calibrations", nargs="+", default=["dataset", "random-normal", "mixed"])
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=5, help="of nncf-qat")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="CPU threads to measure latency with")
    parser.add_argument("--rounds", type=int, default=50, help="images for the latency")
    parser.add_argument("--isa", nargs="*", default=[], help="measure latency again with these as OpenVINO's newest")
    parser.add_argument("--latency-only", action="store_true", help="quantize nothing, measure what is there")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table = None if options.latency_only else scan(options.data)
    failed = [run for run in options.runs if [attempt(step) for step in steps(options, run, table)].count(False)]
    for isa in options.isa:
        # The variable is read once, when OpenVINO is loaded. The last of an option given twice counts.
        words = [sys.executable, __file__, *sys.argv[1:], "--latency-only", "--isa"]
        if subprocess.run(words, env={**os.environ, ISA: isa}, check=False).returncode:
            failed.append(isa)
    if failed:
        sys.exit(f"failed: {', '.join(str(name) for name in failed)}")


def steps(options, run, table):
    """Yield what is to be measured of a run, each by itself."""
    chosen = rows(options)
    if not options.latency_only:
        yield lambda: measure_float(options, run, table)
        for row in chosen:
            yield lambda row=row: measure(options, run, row, table)
    for threads in options.threads:
        yield lambda threads=threads: measure_latency(options, run, chosen, threads)


def attempt(step):
    """Take a step and tell whether it went well: what fails must not stop what comes after it."""
    try:
        step()
    except Exception:
        traceback.print_exc()
        return False
    return True


def rows(options):
    """Return the rows asked for."""
    found = []
    for backend in options.backends:
        # Noise calibrates nothing where nothing is calibrated; training starts from the images it trains on.
        sources = options.calibrations if backend.endswith("int8") else options.calibrations[:1]
        found += [Row(backend, backend, source) for source in sources]
    return found + [row for row in EXTRA if row.name in options.extra]


def known(path):
    """Return the keys of the lines that are there."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {json.loads(line)["key"] for line in lines if line.strip()}


def write(path, key, kind, **facts):
    line = json.dumps({"key": key, "kind": kind, **facts}, allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line[:200], file=sys.stderr)


def figures(report):
    """Return the metrics of a report by category, and their mean."""
    rows = {**report["categories"], "mean": report["mean"]}
    return {name: {metric: values[metric] for metric in METRICS} for name, values in rows.items()}


def measure_float(options, run, table):
    """Measure the run itself, by torch."""
    key = f"{run.name}/torch"
    if key in known(options.out):
        return
    with open_detector(run) as detector:
        report = evaluate(detector, table).report
    write(options.out, key, "accuracy", run=str(run), method=method_of(run), backend="torch", metrics=figures(report))


def method_of(run):
    return read_json(run / "run.json")["model"]


def folder_of(options, run, row):
    return options.work / run.name / row.folder


def measure(options, run, row, table):
    """Quantize where it has not been done, and evaluate."""
    key = f"{run.name}/{row.name}/{row.calibration}"
    if key in known(options.out):
        return
    folder = folder_of(options, run, row)
    facts = {"run": str(run), "method": method_of(run), "backend": row.name, "calibration": row.calibration}
    started = time.monotonic()
    try:
        if not finished(folder):
            given = {**row.options, **({"epochs": options.epochs} if row.backend == "nncf-qat" else {})}
            if row.source:
                (trained,) = (other for other in EXTRA if other.name == row.source)
                given["source"] = str(folder_of(options, run, trained))
            begun = (folder / "quantized.json").is_file() and Quantized(folder).manifest().status == "quantizing"
            order = Order(run, folder, row.backend, row.calibration, options.samples, options=given, noise_std=row.noise_std)
            quantize(replace(order, resume=begun, overwrite=not begun))
    except UadxError as error:
        write(options.out, key, "rejected", **facts, reason=str(error))
        return
    seconds = time.monotonic() - started
    with open_detector(folder) as detector:
        report = evaluate(detector, table).report
    manifest = Quantized.open(folder).manifest()
    write(
        options.out,
        key,
        "accuracy",
        **facts,
        precision=manifest.precision,
        profile=manifest.profile,
        metrics=figures(report),
        size=manifest.size,
        agreement=manifest.agreement,
        details=manifest.details,
        samples=manifest.calibration["samples"],
        seconds=round(seconds, 1),
    )


def finished(folder):
    return (folder / "quantized.json").is_file() and Quantized(folder).manifest().status == "finished"


def measure_latency(options, run, chosen, threads):
    """Measure one image at a time, the results of a run taking turns."""
    from uad_plugins.runtime.onnxruntime_detector import OnnxRuntimeDetector
    from uad_plugins.runtime.openvino_detector import OpenVinoDetector

    isa = os.environ.get(ISA, "all")
    key = f"{run.name}/latency/{threads}" + ("" if isa == "all" else f"/{isa}")
    if key in known(options.out):
        return
    detectors, executed = {}, {}
    for row in chosen:
        folder = folder_of(options, run, row)
        # Of what differs in the calibration alone one is enough.
        if f"{row.name} openvino" in detectors or f"{row.name} onnxruntime" in detectors or not finished(folder):
            continue
        manifest = Quantized.open(folder).manifest()
        arguments = (manifest, NO_THRESHOLDS, row.name, threads)
        if "model.xml" in manifest.files:
            detectors[f"{row.name} openvino"] = OpenVinoDetector(folder / "model.xml", *arguments)
        if "model.onnx" in manifest.files:
            detectors[f"{row.name} onnxruntime"] = OnnxRuntimeDetector(folder / "model.onnx", *arguments)
    if not detectors:
        return
    size = next(iter(detectors.values())).image_size
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    times = {name: [] for name in detectors}
    for turn in range(options.rounds + WARM_UP):
        for name, detector in detectors.items():
            started = time.perf_counter()
            detector.run(image)
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - started))
    for name, detector in detectors.items():
        if isinstance(detector, OpenVinoDetector):
            executed[name] = counters(detector, image, threads, options.rounds)
    summary = {
        name: {
            "median_ms": round(statistics.median(values), 3),
            "p10_ms": round(float(np.percentile(values, 10)), 3),
            "p90_ms": round(float(np.percentile(values, 90)), 3),
        }
        for name, values in times.items()
    }
    base = summary.get("fp32 openvino", {}).get("median_ms")
    ratios = {name: round(base / values["median_ms"], 3) for name, values in summary.items()} if base else {}
    write(
        options.out,
        key,
        "latency",
        run=str(run),
        method=method_of(run),
        threads=threads,
        isa=isa,
        image_size=list(size),
        latency=summary,
        speed_up=ratios,
        executed=executed,
        cpu=cpu_flags(),
        machine=machine(),
    )


def counters(detector, image, threads, rounds):
    """Return what OpenVINO executed: convolutions by precision and kernel, and the share of time by type of layer.

    Counting costs time itself, so this is no measurement of latency: what limits a network is the largest share.
    """
    model = prepare(read(detector.path), detector.mean, detector.std)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", {**hints, "PERF_COUNT": True})
    request = compiled.create_infer_request()
    spent, convolutions = defaultdict(float), defaultdict(int)
    for turn in range(rounds + WARM_UP):
        request.infer([image[None]])
        if turn < WARM_UP:
            continue
        for layer in request.profiling_info:
            kind = layer.node_type
            if kind in {"Convolution", "Deconvolution"}:
                # Ends with the precision, in small letters or not: brgconv_avx512_I8, for instance.
                convolutions[layer.exec_type] += turn == WARM_UP
                kind = f"{kind} {layer.exec_type.rpartition('_')[2].lower()}"
            spent[kind] += layer.real_time.total_seconds()
    total = sum(spent.values()) or 1.0
    shares = {kind: round(seconds / total, 4) for kind, seconds in sorted(spent.items(), key=lambda item: -item[1])}
    return {
        "convolutions": dict(sorted(convolutions.items())),
        "share_of_time": {kind: share for kind, share in shares.items() if share >= 0.001},
    }


if __name__ == "__main__":
    main()
