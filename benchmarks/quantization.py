"""AUROC, size and latency of runs by backend and calibration, as JSON lines; what is there already is not measured again.

    python benchmarks/quantization.py RUN... --data DATA --out results/quantization.jsonl

A line is an ``accuracy`` of one run, backend and calibration, or a ``latency`` of one run: all its results measured in the
same process in turn (one image each, over and over), so that what else the machine does hits all of them alike.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

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
from uad_plugins.runtime.exported import normalise

BACKENDS = ["fp32", "fp16", "openvino-int8", "tensorrt-int8", "nncf-qat"]
METRICS = ("image_auroc", "pixel_auroc", "aupro")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True, help="labelled data of the runs")
    parser.add_argument("--out", type=Path, default=Path("results/quantization.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("results/quantized"), help="folder for the quantized models")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--calibrations", nargs="+", default=["dataset", "random-normal", "mixed"])
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=5, help="of nncf-qat")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads to measure latency with")
    parser.add_argument("--rounds", type=int, default=50, help="images for the latency")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table = scan(options.data)
    for run in options.runs:
        measure_float(options, run, table)
        for backend in options.backends:
            # Noise calibrates nothing where nothing is calibrated; training starts from the images it trains on.
            for source in options.calibrations if backend.endswith("int8") else options.calibrations[:1]:
                measure(options, run, backend, source, table)
        for threads in options.threads:
            measure_latency(options, run, threads)


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


def folder_of(options, run, backend, source):
    return options.work / run.name / f"{backend}-{source}"


def measure(options, run, backend, source, table):
    """Quantize where it has not been done, and evaluate."""
    key = f"{run.name}/{backend}/{source}"
    if key in known(options.out):
        return
    folder = folder_of(options, run, backend, source)
    facts = {"run": str(run), "method": method_of(run), "backend": backend, "calibration": source}
    started = time.monotonic()
    try:
        if not finished(folder):
            given = {"epochs": options.epochs} if backend == "nncf-qat" else {}
            begun = (folder / "quantized.json").is_file() and Quantized(folder).manifest().status == "quantizing"
            order = Order(run, folder, backend, source, options.samples, options=given, resume=begun, overwrite=not begun)
            quantize(order)
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


def measure_latency(options, run, threads):
    """Measure one image at a time, the results of a run taking turns."""
    from uad_plugins.runtime.onnxruntime_detector import OnnxRuntimeDetector
    from uad_plugins.runtime.openvino_detector import OpenVinoDetector

    key = f"{run.name}/latency/{threads}"
    if key in known(options.out):
        return
    detectors = {}
    for backend in options.backends:
        folder = folder_of(options, run, backend, options.calibrations[0])
        if not finished(folder):
            continue
        manifest = Quantized.open(folder).manifest()
        arguments = (manifest, NO_THRESHOLDS, backend, threads)
        if "model.xml" in manifest.files:
            detectors[f"{backend} openvino"] = OpenVinoDetector(folder / "model.xml", *arguments)
        if "model.onnx" in manifest.files:
            detectors[f"{backend} onnxruntime"] = OnnxRuntimeDetector(folder / "model.onnx", *arguments)
    if not detectors:
        return
    size = next(iter(detectors.values())).image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.uint8)
    times = {name: [] for name in detectors}
    for turn in range(options.rounds + 5):
        for name, detector in detectors.items():
            image = normalise(pixels, detector.mean, detector.std)
            started = time.perf_counter()
            detector.run(image)
            if turn >= 5:
                times[name].append(1000 * (time.perf_counter() - started))
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
        image_size=list(size),
        latency=summary,
        speed_up=ratios,
        cpu=cpu_flags(),
        machine=machine(),
    )


if __name__ == "__main__":
    main()
