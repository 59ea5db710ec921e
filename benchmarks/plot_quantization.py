"""Draws what ``quantization.py`` has measured: mean image AUROC and latency by precision, one column a method.

python benchmarks/plot_quantization.py results/quantization.jsonl docs/images/quantization.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ORDER = ["torch", "fp32", "fp16", "openvino-int8", "tensorrt-int8", "nncf-qat"]
ROOM = 0.05
COLOURS = {"dataset": "#2f6fdd", "random-normal": "#e08a1e", "mixed": "#5aa469"}
GREY = "#8a96a3"
ENGINES = {"OpenVINO": "#2a9d9d", "ONNX Runtime": "#c9a0dc"}
FLOATS = {"torch", "fp32", "fp16"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="all", help="latency measured with this as OpenVINO's newest instructions")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text().splitlines() if line.strip()]
    methods = sorted({line["method"] for line in lines})
    figure, axes = plt.subplots(2, len(methods), figsize=(max(7, 5 * len(methods)), 7), squeeze=False, sharey="row")
    values = []
    for column, method in enumerate(methods):
        mine = [line for line in lines if line["method"] == method]
        values += accuracy(axes[0][column], [line for line in mine if line["kind"] == "accuracy"])
        latency(axes[1][column], [x for x in mine if x["kind"] == "latency" and chosen(x, options)])
        axes[0][column].set_title(method.replace("_", " "))
    if values:
        # The axes of a row are one: the lowest bar of all columns has to be seen.
        axes[0][0].set_ylim(max(0.0, min(values) - ROOM), min(1.0, max(values) + ROOM))
    axes[0][0].set_ylabel("mean image AUROC")
    axes[1][0].set_ylabel(f"median latency, ms ({options.threads} thread{'s' if options.threads > 1 else ''})")
    used = {line.get("calibration") for line in lines if line.get("backend", "fp32") not in FLOATS}
    named = {f"calibrated: {name}": colour for name, colour in COLOURS.items() if name in used} | ENGINES
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in named.values()]
    figure.legend(handles, list(named), loc="lower center", ncol=len(named), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=130)


def chosen(line, options):
    return line["threads"] == options.threads and line.get("isa", "all") == options.isa


def accuracy(axis, lines):
    """Draw one bar a backend and calibration, a dashed line at FP32, and return the values."""
    bars = defaultdict(list)
    for line in lines:
        bars[line["backend"], line.get("calibration", "")].append(line["metrics"]["mean"]["image_auroc"])
    keys = sorted(bars, key=lambda key: (ORDER.index(key[0]) if key[0] in ORDER else len(ORDER), key[1]))
    values = [sum(bars[key]) / len(bars[key]) for key in keys]
    calibrated = [key[1] if key[0] not in FLOATS else "" for key in keys]
    axis.bar(range(len(keys)), values, color=[COLOURS.get(name, GREY) for name in calibrated])
    axis.set_xticks(range(len(keys)), [key[0] for key in keys], rotation=45, ha="right", fontsize=8)
    reference = bars.get(("torch", ""), values[:1])
    if reference:
        axis.axhline(sum(reference) / len(reference), color="#1d2733", linestyle="--", linewidth=1)
    style(axis)
    return values


def latency(axis, lines):
    """Draw one bar a backend and engine, with the 10th and 90th percentile."""
    found = {}
    for line in lines:
        found |= line["latency"]
    names = sorted(found, key=lambda name: (ORDER.index(name.split()[0]) if name.split()[0] in ORDER else 9, name))
    middle = [found[name]["median_ms"] for name in names]
    spread = [
        [found[name]["median_ms"] - found[name]["p10_ms"] for name in names],
        [found[name]["p90_ms"] - found[name]["median_ms"] for name in names],
    ]
    colours = [ENGINES["OpenVINO" if name.endswith("openvino") else "ONNX Runtime"] for name in names]
    axis.bar(range(len(names)), middle, yerr=spread, color=colours, error_kw={"linewidth": 0.8})
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    style(axis)


def style(axis):
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="y", linewidth=0.4)
    axis.set_axisbelow(True)


if __name__ == "__main__":
    main()
