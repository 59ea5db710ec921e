"""The audit of a quantized model: every rule of its profile, on the files as they lie on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from uad_plugins.hookspecs import QuantizationResult
from uad_plugins.quantization import tensorrt_rules

Findings = dict[str, dict[str, list[str]]]
"""What is wrong by file and rule; an empty list for a rule that is kept."""

FLOAT_RULES = ("opset", "operators", "static shapes", "no identity on constants")
ONNX_RULES = {"float": FLOAT_RULES, "openvino": tensorrt_rules.OPENVINO, "tensorrt": tuple(tensorrt_rules.RULES)}


def audit(folder: Path, result: QuantizationResult) -> Findings:
    """Check the model's files by the rules of their profile.

    Args:
        folder: Where the files lie.
        result: What the backend says they are.
    """
    found: Findings = {}
    if "model.onnx" in result.files:
        model = onnx.load(folder / "model.onnx")
        found["model.onnx"] = tensorrt_rules.check(model, ONNX_RULES[result.profile], whole=result.whole)
    if "model.xml" in result.files:
        import openvino

        from uad_plugins.quantization import openvino_rules

        read = openvino.Core().read_model(folder / "model.xml")
        rules = openvino_rules.check(read, whole=result.whole)
        found["model.xml"] = {"static shapes": rules["static shapes"]} if result.profile == "float" else rules
    return found


def placements(folder: Path, result: QuantizationResult) -> dict[str, dict[str, Any]]:
    """Return what of each file is quantized; see ``tensorrt_rules.placement``. Nothing of float profiles."""
    found: dict[str, dict[str, Any]] = {}
    if result.profile != "float" and "model.onnx" in result.files:
        found["model.onnx"] = tensorrt_rules.placement(onnx.load(folder / "model.onnx"))
    if result.profile != "float" and "model.xml" in result.files:
        import openvino

        from uad_plugins.quantization import openvino_rules

        found["model.xml"] = openvino_rules.placement(openvino.Core().read_model(folder / "model.xml"))
    return found


def wrong(findings: Findings, most: int = 3) -> list[str]:
    """Return in words what is wrong, a few of each rule."""
    lines = []
    for file, rules in findings.items():
        for rule, cases in rules.items():
            lines += [f"{file}: {rule}: {case}" for case in cases[:most]]
            if len(cases) > most:
                lines.append(f"{file}: {rule}: and {len(cases) - most} more")
    return lines
