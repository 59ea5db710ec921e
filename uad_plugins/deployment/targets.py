"""The targets that run a bundle by themselves: OpenVINO on a CPU, ONNX, and TensorRT on a Jetson. No torch in here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from uad_plugins.deployment import jetson
from uad_plugins.errors import UadxError
from uad_plugins.hookspecs import PackagingRequest, PackagingResult

PREDICT = """```sh
pip install 'uadx[{extra}]'
uadx predict {{bundle}} IMAGES --category CATEGORY --out MAPS
```

```python
from uad_plugins.runtime import Detector

result = Detector("{{bundle}}").predict("image.png", category="CATEGORY")
print(result.score, result.threshold, result.verdict, result.map.shape)
```"""

JETSON = """On the device, in this folder (numpy, Pillow, `tensorrt` and `pycuda` are needed, nothing else):

```sh
python3 runner.py build
python3 runner.py predict IMAGES --category CATEGORY --out MAPS
python3 runner.py benchmark
```

TensorRT builds its engine there. No engine had been built on a device when this version of uadx was published. The file
obeys TensorRT's rules, and its operators and opset are those of version {versions}; what it was compared with, and run by
what, is under "Measured"."""


def openvino_cpu(request: PackagingRequest) -> PackagingResult:
    """Write ``model.xml`` that takes 8-bit pixels."""
    name, outputs = write_ir(request, request.folder / "model.xml")
    return PackagingResult(name, outputs, openvino="model.xml", pixels=True, usage=PREDICT.format(extra="openvino-runtime"))


def onnx(request: PackagingRequest) -> PackagingResult:
    """Copy ``model.onnx``."""
    source = model_of(request, "onnx")
    shutil.copyfile(source, request.folder / "model.onnx")
    name, outputs = tensor_names(source)
    return PackagingResult(name, outputs, onnx="model.onnx", usage=PREDICT.format(extra="onnx-runtime"))


def tensorrt_jetson(request: PackagingRequest) -> PackagingResult:
    """Copy ``model.onnx`` and the runner, and hold the model to TensorRT's rules."""
    import onnx as onnx_package

    from uad_plugins.quantization.audit import FLOAT_RULES
    from uad_plugins.quantization.tensorrt_rules import RULES, by_version, check

    source = model_of(request, "onnx")
    if request.profile == "openvino":
        raise UadxError(
            "this model was quantized by OpenVINO's rules, which TensorRT does not take",
            "quantize with --backend tensorrt-int8, or nncf-qat --set profile=tensorrt",
        )
    rules = FLOAT_RULES if request.profile == "float" else tuple(RULES)
    model = onnx_package.load(source)
    versions = by_version(model)
    good = [version for version, wrong in versions.items() if not wrong]
    newest = list(versions)[-1]
    # One version that takes it is enough; where none does, what the newest complains of is what has to be changed.
    checks = check(model, rules, version=good[0] if good else newest, whole=request.whole)
    text = ", ".join(good)
    notes = [f"good for TensorRT {text}"]
    notes += [f"not for TensorRT {version}: {wrong[0]}" for version, wrong in versions.items() if wrong]
    shutil.copyfile(source, request.folder / "model.onnx")
    copy_runner(request.folder)
    name, outputs = tensor_names(source)
    return PackagingResult(
        name,
        outputs,
        onnx="model.onnx",
        usage=JETSON.format(versions=text),
        checks=checks,
        details={"tensorrt": versions},
        notes=tuple(notes),
    )


def copy_runner(folder: Path) -> None:
    """Copy what runs on the device.

    Raises:
        UadxError: This installation has no runner.
    """
    home = Path(jetson.__file__).parent
    if not (home / "runner.py").is_file():
        raise UadxError("the Jetson runner is missing from this installation of uadx", "install uadx again")
    shutil.copyfile(home / "runner.py", folder / "runner.py")
    shutil.copytree(home / "uadx_jetson", folder / "uadx_jetson", ignore=shutil.ignore_patterns("__pycache__"))


def model_of(request: PackagingRequest, kind: str) -> Path:
    """Return the exported model of a format.

    Raises:
        UadxError: The source has none.
    """
    if kind not in request.models:
        advice = "--backend tensorrt-int8 or nncf-qat" if kind == "onnx" else "--backend openvino-int8"
        raise UadxError(f"this model has no {'ONNX' if kind == 'onnx' else 'OpenVINO'} file", f"quantize with {advice}")
    return request.models[kind]


def write_ir(request: PackagingRequest, path: Path) -> tuple[str, tuple[str, str]]:
    """Write the model as OpenVINO IR with normalisation and layout in its graph.

    Args:
        request: What is packaged.
        path: The ``.xml`` file.

    Returns:
        Names of the input and of its two outputs.

    Raises:
        UadxError: There is no model.
    """
    import openvino

    from uad_plugins.runtime.graph import prepare, read

    source = request.models.get("openvino") or model_of(request, "onnx")
    model = prepare(read(source), request.mean, request.std)
    path.parent.mkdir(parents=True, exist_ok=True)
    # What is stored as FP16 or INT8 already stays so.
    openvino.save_model(model, path, compress_to_fp16=False)
    score, anomaly_map = (output.get_any_name() for output in model.outputs[:2])
    return model.input(0).get_any_name(), (score, anomaly_map)


def tensor_names(path: Path) -> tuple[str, tuple[str, str]]:
    """Return the names of an ONNX model's input, and of its score and its map."""
    import onnx as onnx_package

    graph: Any = onnx_package.load(path, load_external_data=False).graph
    constants = {initializer.name for initializer in graph.initializer}
    (name,) = (value.name for value in graph.input if value.name not in constants)
    return name, (graph.output[0].name, graph.output[1].name)
