"""Compares where our TensorRT graph and NVIDIA ModelOpt's have quantizers.

    python benchmarks/modelopt_oracle.py FP32_RESULT TENSORRT_RESULT

Both are folders that ``uadx quantize`` wrote (backends ``fp32`` and ``tensorrt-int8``). ModelOpt pins other versions than
uadx does: run this in an environment of its own. Without ModelOpt it says so and leaves with status 0.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx

from uad_plugins.quantization.graph import ADD
from uad_plugins.quantization.onnx_graph import OnnxGraph, plain
from uad_plugins.quantization.tensorrt_rules import PASSING, check


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("tensorrt", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/modelopt.onnx"))
    options = parser.parse_args()
    if importlib.util.find_spec("modelopt") is None:
        print("modelopt is not installed here: nothing compared", file=sys.stderr)
        return
    source = onnx.load(options.fp32 / "model.onnx")
    theirs = plain(quantized_by_modelopt(options.fp32 / "model.onnx", source, options.out))
    ours = onnx.load(options.tensorrt / "model.onnx")
    places = [placement(model) for model in (ours, theirs)]
    document = {
        "ours": {kind: len(names) for kind, names in places[0].items()},
        "modelopt": {kind: len(names) for kind, names in places[1].items()},
        "only ours": {kind: sorted(places[0][kind] - places[1][kind]) for kind in places[0]},
        "only modelopt": {kind: sorted(places[1][kind] - places[0][kind]) for kind in places[0]},
        "rules that modelopt's graph breaks": {rule: cases[:3] for rule, cases in check(theirs).items() if cases},
    }
    print(json.dumps(document, indent=2))


def quantized_by_modelopt(path, model, out):
    from modelopt.onnx.quantization import quantize

    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    head = [node.name for name, node in OnnxGraph.of(model).nodes.items() if name in OnnxGraph.of(model).head()]
    out.parent.mkdir(parents=True, exist_ok=True)
    quantize(
        str(path),
        quantize_mode="int8",
        calibration_data={model.graph.input[0].name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)},
        calibration_method="max",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        nodes_to_exclude=[name for name in head if name],
        output_path=str(out),
    )
    return onnx.load(out)


def placement(model):
    """Return what is quantized: convolutions by their place in the order of the graph, and branches of additions."""
    graph = OnnxGraph.of(model)
    convolutions = {name: f"convolution {number}" for number, name in enumerate(graph.convolutions())}
    additions = [name for name, kind in graph.kinds.items() if kind == ADD]
    found = {"inputs": set(), "weights": set(), "main branches": set(), "skip branches": set()}
    for name, label in convolutions.items():
        if graph.is_dequantized(graph.through(graph.inputs[name][0], PASSING)):
            found["inputs"].add(label)
        if graph.is_dequantized(graph.inputs[name][1]):
            found["weights"].add(label)
    for name, main, skip in graph.additions():
        label = f"addition {additions.index(name)}"
        for branch, kind in ((main, "main branches"), (skip, "skip branches")):
            if graph.is_dequantized(graph.through(branch, PASSING)):
                found[kind].add(label)
    return found


if __name__ == "__main__":
    main()
