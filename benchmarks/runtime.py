"""From image files to score and map: a bundle beside OpenVINO's own limit and anomalib's ``OpenVINOInferencer``.

    python benchmarks/runtime.py RUN IMAGES [--quantized Q] [--images 500] [--repeats 3] [--soak 50000] [--out FILE]

RUN is a trained run (STFPM for the comparison with anomalib), IMAGES a folder. The run is deployed as FP32, Q as INT8. Each
measurement is a process of its own, the order alternates, and the medians over the repeats count. A stream is timed whole,
from asking for it to its last result, after another one has warmed up. The limit is what ``AsyncInferQueue`` reaches on
tensors that lie in memory, and ``benchmark_app`` on the same file; the peer is anomalib's own export of the same weights
(which needs ``onnxscript``), run by its inferencer on the same files.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STARTED = time.perf_counter()
WARM_UP = 32


def resident():
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def percentiles(seconds):
    values = 1000 * np.asarray(seconds)
    return {f"p{which}_ms": round(float(np.percentile(values, which)), 3) for which in (50, 90, 99)}


def files_of(folder, count):
    from uad_plugins.data.layouts.walking import images

    found = sorted(images(Path(folder)))
    return list(itertools.islice(itertools.cycle(found), count))


def throughput(bundle, folder, count):
    """Ours, many images: files to score and map."""
    from uad_plugins.runtime import Detector

    files = files_of(folder, count)
    detector = Detector(bundle)
    warming = detector.stream(files_of(folder, WARM_UP))
    next(warming)
    first = time.perf_counter() - STARTED
    drain(warming)
    before = resident()
    times = drain(detector.stream(files))
    memory = {"before": before, "after": resident()}
    gaps = np.diff(times[1:])
    rate = count / (times[-1] - times[0])
    return {"images_per_s": rate, "between_results": percentiles(gaps), "first_result_s": first, "rss_mb": memory}


def drain(stream):
    """Take all of a stream; return when that began, and when each result came."""
    times = [time.perf_counter()]
    times.extend(time.perf_counter() for _ in stream)
    return times


def latency(bundle, folder, count):
    """Ours, one image at a time: file to score and map."""
    from uad_plugins.runtime import Detector

    files = files_of(folder, count)
    detector = Detector(bundle)
    detector.predict(files[0])
    first, times = time.perf_counter() - STARTED, []
    for file in files:
        started = time.perf_counter()
        detector.predict(file)
        times.append(time.perf_counter() - started)
    return {**percentiles(times), "images_per_s": len(files) / sum(times), "first_result_s": first, "rss_mb": resident()}


def in_memory(bundle, folder, count):
    """Measure ours on images that are decoded already: what the pipeline itself costs."""
    from uad_plugins.detector import decode
    from uad_plugins.runtime import Detector

    detector = Detector(bundle)
    pixels = [decode(file, detector.image_size).pixels for file in files_of(folder, 16)]
    drain(detector.stream(itertools.islice(itertools.cycle(pixels), WARM_UP)))
    times = drain(detector.stream(itertools.islice(itertools.cycle(pixels), count)))
    return {"images_per_s": count / (times[-1] - times[0])}


def decoding(bundle, folder, count):
    """Decoding and resizing alone, in one thread."""
    from uad_plugins.deployment.bundle import Bundle
    from uad_plugins.detector import decode

    size, times = Bundle.open(bundle).manifest.image_size, []
    for file in files_of(folder, count):
        started = time.perf_counter()
        decode(file, size)
        times.append(time.perf_counter() - started)
    return {**percentiles(times), "mean_ms": 1000 * statistics.fmean(times)}


def _compiled(bundle, hint, **more):
    import openvino

    from uad_plugins.deployment.bundle import Bundle

    opened = Bundle.open(bundle)
    options = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32", **more}
    return openvino.Core().compile_model(opened.file(opened.manifest.openvino), "CPU", options)


def limit_throughput(bundle, _folder, count):
    """OpenVINO's asynchronous queue on tensors in memory: nothing is decoded, nothing taken out."""
    import openvino

    compiled = _compiled(bundle, "THROUGHPUT")
    queue = openvino.AsyncInferQueue(compiled)
    rng = np.random.default_rng(0)
    for request in queue:
        request.get_input_tensor().data[:] = rng.integers(0, 256, request.get_input_tensor().shape)
    for _ in range(2 * len(queue)):
        queue.start_async()
    queue.wait_all()
    started = time.perf_counter()
    for _ in range(count):
        queue.start_async()
    queue.wait_all()
    return {"images_per_s": count / (time.perf_counter() - started), "requests": len(queue)}


def limit_latency(bundle, _folder, count):
    """One request on a tensor in memory."""
    compiled = _compiled(bundle, "LATENCY")
    request, times = compiled.create_infer_request(), []
    rng = np.random.default_rng(0)
    request.get_input_tensor().data[:] = rng.integers(0, 256, request.get_input_tensor().shape)
    request.infer(share_outputs=True)
    for _ in range(count):
        started = time.perf_counter()
        request.infer(share_outputs=True)
        times.append(time.perf_counter() - started)
    return percentiles(times)


def benchmark_app(bundle, hint, seconds):
    """The real one on the bundle's file; None where it is not installed."""
    from uad_plugins.deployment.bundle import Bundle

    program = shutil.which("benchmark_app", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return None
    opened = Bundle.open(bundle)
    words = [program, "-m", str(opened.file(opened.manifest.openvino)), "-d", "CPU", "-hint", hint, "-t", str(seconds)]
    done = subprocess.run([*words, "-infer_precision", "f32"], capture_output=True, text=True, check=True)
    figures = {"images_per_s": r"Throughput:\s+([\d.]+)", "p50_ms": r"Median:\s+([\d.]+)"}
    return {name: float(re.search(pattern, done.stdout)[1]) for name, pattern in figures.items()}


def export_peer(run, folder):
    """Have anomalib export the same weights, its own way."""
    import logging

    from anomalib.deploy import ExportType
    from anomalib.engine import Engine
    from anomalib.models import Stfpm

    from uad_plugins.artifacts import Run
    from uad_plugins.models.backbones import alias, backbone_weights

    logging.disable(logging.CRITICAL)
    with backbone_weights("bundled"):
        # The checkpoint replaces these weights: without them anomalib would ask timm's hub.
        model = Stfpm.load_from_checkpoint(Run(Path(run)).checkpoint, map_location="cpu", backbone=alias("resnet18"))
    with contextlib.redirect_stdout(io.StringIO()):
        engine = Engine(default_root_dir=folder, logger=False)
        return engine.export(model, ExportType.OPENVINO, export_root=folder)


def peer(model, folder, count, **config):
    """Run anomalib's inferencer, file to result: one at a time, as it offers no other way."""
    from anomalib.deploy import OpenVINOInferencer

    files = files_of(folder, count)
    inferencer = OpenVINOInferencer(model, device="CPU", config=config)
    inferencer.predict(files[0])
    first, times = time.perf_counter() - STARTED, []
    for file in files:
        started = time.perf_counter()
        inferencer.predict(file)
        times.append(time.perf_counter() - started)
    return {**percentiles(times), "images_per_s": len(files) / sum(times), "first_result_s": first, "rss_mb": resident()}


def peer_f32(model, folder, count):
    """Run it in FP32: left to itself OpenVINO computes in BF16 where the CPU can."""
    return peer(model, folder, count, INFERENCE_PRECISION_HINT="f32")


def layers(bundle, _folder, count):
    """Where the time of one image goes, by OpenVINO's counters: share of each kind of layer, and of the head."""
    compiled = _compiled(bundle, "LATENCY", PERF_COUNT=True)
    request = compiled.create_infer_request()
    totals: dict[str, list[float]] = {}
    for _ in range(min(count, 30)):
        request.infer(share_outputs=True)
        spent: dict[str, float] = {}
        for layer in request.get_profiling_info():
            spent[layer.node_type] = spent.get(layer.node_type, 0.0) + 1000 * layer.real_time.total_seconds()
        for kind, value in spent.items():
            totals.setdefault(kind, []).append(value)
    medians = {kind: statistics.median(values) for kind, values in totals.items()}
    whole = sum(medians.values())
    ranked = sorted(medians.items(), key=lambda item: -item[1])
    return {"total_ms": whole, "share": {kind: round(value / whole, 4) for kind, value in ranked if value > 0}}


def soak(bundle, folder, count):
    """Resident memory over many images."""
    from uad_plugins.runtime import Detector

    with Detector(bundle) as detector:
        every = max(1, count // 20)
        seen = [resident() for index, _ in enumerate(detector.stream(files_of(folder, count))) if index % every == 0]
    return {"images": count, "rss_mb": seen}


PARTS = {
    "throughput": throughput,
    "latency": latency,
    "in_memory": in_memory,
    "decoding": decoding,
    "limit_throughput": limit_throughput,
    "limit_latency": limit_latency,
    "peer": peer,
    "peer_f32": peer_f32,
    "layers": layers,
    "soak": soak,
}


APP = {f"benchmark_app {hint}": hint for hint in ("throughput", "latency")}
"""OpenVINO's own measurements, repeated like ours."""


def part(name, model, folder, count):
    """Run one measurement in a process of its own."""
    words = [sys.executable, __file__, "--part", name, str(model), str(folder), "--images", str(count)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def median(results):
    """Return the median of each figure over repeats."""
    found = {}
    for key, value in results[0].items():
        values = [result[key] for result in results]
        if isinstance(value, dict):
            found[key] = median(values)
        elif isinstance(value, list):
            found[key] = values
        else:
            found[key] = round(statistics.median(values), 4)
    return found


def measure(arguments, work):
    """Measure everything; returns the report."""
    from uad_plugins.deployment.deploy import Order, deploy

    bundles = {"fp32": work / "fp32"}
    deploy(Order(Path(arguments.model), bundles["fp32"], "openvino-cpu", pictures=False))
    if arguments.quantized:
        bundles["int8"] = work / "int8"
        deploy(Order(Path(arguments.quantized), bundles["int8"], "openvino-cpu", pictures=False))
    peer_model = None if arguments.no_peer else export_peer(arguments.model, work / "anomalib")
    ours = [name for name in PARTS if name not in {"peer", "peer_f32", "soak"}]
    jobs = [(f"{kind} {name}", name, bundle) for kind, bundle in bundles.items() for name in ours]
    jobs += [(f"{kind} {name}", name, bundle) for kind, bundle in bundles.items() for name in APP]
    jobs += [("anomalib f32", "peer_f32", peer_model), ("anomalib as it is", "peer", peer_model)] if peer_model else []
    results = {}
    for repeat in range(arguments.repeats):
        for label, name, model in jobs if repeat % 2 == 0 else jobs[::-1]:
            if name in {"layers", "decoding"} and repeat:
                continue
            if name in APP:
                found = benchmark_app(model, APP[name], arguments.seconds)
            else:
                found = part(name, model, arguments.folder, arguments.images)
            if found is not None:
                results.setdefault(label, []).append(found)
            print(label, found, file=sys.stderr, flush=True)
    report = {"processors": os.cpu_count(), "images": arguments.images}
    report |= {label: median(found) for label, found in results.items()}
    for kind, bundle in bundles.items():
        if arguments.soak:
            report[f"{kind} soak"] = part("soak", bundle, arguments.folder, arguments.soak)
    report["ratios"] = ratios(report, bundles)
    return report


def ratios(report, bundles):
    """What the figures are wanted for."""
    found = {}
    for kind in bundles:
        app = {hint: report.get(f"{kind} {name}") for name, hint in APP.items()}
        rate, slow = report[f"{kind} throughput"]["images_per_s"], report[f"{kind} latency"]["p50_ms"]
        found[f"{kind} throughput / queue on tensors"] = rate / report[f"{kind} limit_throughput"]["images_per_s"]
        decoded = report[f"{kind} decoding"]["p50_ms"]
        request = report[f"{kind} limit_latency"]["p50_ms"]
        found[f"{kind} latency / (request on a tensor + decoding)"] = slow / (request + decoded)
        if app["throughput"] and app["latency"]:
            found[f"{kind} throughput / benchmark_app"] = rate / app["throughput"]["images_per_s"]
            found[f"{kind} latency / (1.1 x benchmark_app + decoding)"] = slow / (1.1 * app["latency"]["p50_ms"] + decoded)
        # What is left for inference when decoding has taken its share of the processors.
        spent = 1 / report[f"{kind} limit_throughput"]["images_per_s"]
        share = report[f"{kind} decoding"]["mean_ms"] / 1000 / report["processors"]
        found[f"{kind} throughput / (queue on tensors + decoding)"] = rate * (spent + share)
        found[f"{kind} in memory / queue on tensors"] = report[f"{kind} in_memory"]["images_per_s"] * spent
        for name in ("anomalib f32", "anomalib as it is"):
            if name in report:
                found[f"{kind} throughput / {name}"] = rate / report[name]["images_per_s"]
    return {name: round(value, 3) for name, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("folder", metavar="IMAGES")
    parser.add_argument("--quantized")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=20, help="of benchmark_app")
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.model, arguments.folder, arguments.images)))
        return
    with tempfile.TemporaryDirectory() as work:
        text = json.dumps(measure(arguments, Path(work)), indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
