"""The targets for model servers, and the rules that their configuration files keep. No torch in here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from typing import Any

from uad_plugins.artifacts import write_json, write_text
from uad_plugins.deployment.options import NAME, OvmsOptions, TritonOptions
from uad_plugins.deployment.plugin import OPENVINO
from uad_plugins.deployment.targets import model_of, tensor_names, write_ir
from uad_plugins.errors import UadxError
from uad_plugins.hookspecs import PackagingRequest, PackagingResult
from uad_plugins.registry import require

OVMS_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "base_path": str,
    "batch_size": (str, int),
    "shape": (str, dict),
    "layout": (str, dict),
    "model_version_policy": dict,
    "nireq": int,
    "target_device": str,
    "plugin_config": dict,
}
"""Keys of a model in OpenVINO Model Server's ``config.json`` (its parameters page), with the type of their value."""

TRITON_TYPES = frozenset(
    {"TYPE_BOOL", "TYPE_STRING", "TYPE_FP16", "TYPE_BF16", "TYPE_FP32", "TYPE_FP64"}
    | {f"TYPE_{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)}
)
TRITON_KINDS = frozenset({"KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"})
TRITON_FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}

OVMS_USAGE = """For OpenVINO Model Server, with this folder mounted as `/bundle`:

```sh
ovms --config_path /bundle/models/config.json --port 9000 --rest_port 8000
```

Clients send `{input}`, uint8 [1, {height}, {width}, 3]: RGB, resized bilinearly with antialiasing. They get `{score}` and
`{map}`."""

TRITON_USAGE = """For NVIDIA Triton, with this folder mounted as `/bundle`:

```sh
tritonserver --model-repository=/bundle/models
```

Clients send `{input}`, {form}; they get `{score}` and `{map}`."""


def ovms(request: PackagingRequest) -> PackagingResult:
    """Write ``models/config.json`` and ``models/NAME/1/model.xml``."""
    options: OvmsOptions = request.options
    file = f"models/{options.name}/1/model.xml"
    name, outputs = write_ir(request, request.folder / file)
    config = {
        "model_config_list": [
            {
                "config": {
                    "name": options.name,
                    # Relative to config.json.
                    "base_path": options.name,
                    "target_device": options.device,
                    "plugin_config": {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"},
                }
            }
        ]
    }
    write_json(request.folder / "models" / "config.json", config)
    height, width = request.image_size
    usage = OVMS_USAGE.format(input=name, height=height, width=width, score=outputs[0], map=outputs[1])
    return PackagingResult(
        name, outputs, openvino=file, pixels=True, usage=usage, checks={"config.json": check_ovms(config)}
    )


def triton(request: PackagingRequest) -> PackagingResult:
    """Write ``models/NAME/config.pbtxt`` and ``models/NAME/1/model.onnx`` or ``model.xml``."""
    options: TritonOptions = request.options
    backend = options.backend
    if backend == "auto":
        backend = "onnxruntime" if "onnx" in request.models else "openvino"
    pixels = backend == "openvino"
    file = f"models/{options.name}/1/{TRITON_FILES[backend]}"
    target = request.folder / file
    if pixels:
        require("triton with backend=openvino", OPENVINO)
        name, outputs = write_ir(request, target)
    else:
        source = model_of(request, "onnx")
        target.parent.mkdir(parents=True)
        shutil.copyfile(source, target)
        name, outputs = tensor_names(source)
    height, width = request.image_size
    shape = [1, height, width, 3] if pixels else [1, 3, height, width]
    config = {
        "name": options.name,
        "backend": backend,
        # The batch is part of the shapes below: one image.
        "max_batch_size": 0,
        "input": [{"name": name, "data_type": "TYPE_UINT8" if pixels else "TYPE_FP32", "dims": shape}],
        "output": [
            {"name": outputs[0], "data_type": "TYPE_FP32", "dims": [1]},
            {"name": outputs[1], "data_type": "TYPE_FP32", "dims": [1, height, width]},
        ],
        "instance_group": [{"kind": options.kind, "count": options.count}],
    }
    text = pbtxt(config)
    write_text(request.folder / "models" / options.name / "config.pbtxt", text)
    form = f"uint8 {shape}: RGB" if pixels else f"float32 {shape}: RGB in 0..1, normalised by {request.mean}, {request.std}"
    form += ", resized bilinearly with antialiasing"
    usage = TRITON_USAGE.format(input=name, form=form, score=outputs[0], map=outputs[1])
    return PackagingResult(
        name,
        outputs,
        onnx=None if pixels else file,
        openvino=file if pixels else None,
        pixels=pixels,
        usage=usage,
        checks={"config.pbtxt": check_triton(read_pbtxt(text))},
    )


def check_ovms(config: Mapping[str, Any]) -> list[str]:
    """Return what OpenVINO Model Server would not accept in a ``config.json``."""
    entries = config.get("model_config_list")
    if not isinstance(entries, list) or not entries:
        return ["model_config_list is not a list of models"]
    wrong = [f"unknown key '{key}'" for key in set(config) - {"model_config_list", "monitoring", "mediapipe_config_list"}]
    for entry in entries:
        model = entry.get("config") if isinstance(entry, Mapping) else None
        if not isinstance(model, Mapping) or set(entry) != {"config"}:
            wrong.append("a model is not {'config': {…}}")
            continue
        wrong += [f"a model has no '{key}'" for key in ("name", "base_path") if not model.get(key)]
        for key, value in model.items():
            if key not in OVMS_KEYS:
                wrong.append(f"unknown key '{key}' of a model")
            elif not isinstance(value, OVMS_KEYS[key]):
                wrong.append(f"'{key}' is a {type(value).__name__}")
    return wrong


def check_triton(config: Mapping[str, Any]) -> list[str]:
    """Return what NVIDIA Triton would not accept in a ``config.pbtxt``, read by ``read_pbtxt``."""
    known = {"name", "backend", "platform", "max_batch_size", "input", "output", "instance_group", "version_policy"}
    wrong = [f"unknown field '{name}'" for name in sorted(set(config) - known)]
    if not re.match(NAME, str(config.get("name", ""))):
        wrong.append("no name")
    if config.get("backend") not in TRITON_FILES:
        wrong.append(f"backend '{config.get('backend')}' is not one of {', '.join(TRITON_FILES)}")
    if not isinstance(config.get("max_batch_size"), int) or config["max_batch_size"] < 0:
        wrong.append("max_batch_size is not a number")
    for end in ("input", "output"):
        tensors = config.get(end)
        if not isinstance(tensors, list) or not tensors:
            wrong.append(f"no {end}")
            continue
        for tensor in tensors:
            wrong += [f"unknown field '{name}' of an {end}" for name in sorted(set(tensor) - {"name", "data_type", "dims"})]
            if not tensor.get("name"):
                wrong.append(f"an {end} has no name")
            if tensor.get("data_type") not in TRITON_TYPES:
                wrong.append(f"data_type '{tensor.get('data_type')}' of an {end} does not exist")
            dims = tensor.get("dims")
            if not isinstance(dims, list) or not dims or not all(isinstance(d, int) and (d > 0 or d == -1) for d in dims):
                wrong.append(f"dims of an {end} are not positive numbers")
    for group in config.get("instance_group", []):
        if group.get("kind", "KIND_AUTO") not in TRITON_KINDS:
            wrong.append(f"kind '{group['kind']}' does not exist")
        if not isinstance(group.get("count", 1), int) or group.get("count", 1) < 1:
            wrong.append("count of instances is not positive")
    return wrong


def pbtxt(content: Mapping[str, Any], indent: str = "") -> str:
    """Write a message in protobuf's text format: mappings are messages, upper-case words enumerators."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{name} {{\n{pbtxt(item, indent + '  ')}{indent}}}\n" for item in value]
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[ {', '.join(map(_scalar, value))} ]"
    if isinstance(value, str) and not re.fullmatch(r"(TYPE|KIND)_[A-Z0-9]+", value):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)


def read_pbtxt(text: str) -> dict[str, Any]:
    """Read what ``pbtxt`` writes: repeated messages as lists, numbers, strings and enumerators.

    Raises:
        UadxError: It is not of that form.
    """
    tokens = re.findall(r'"(?:\\.|[^"\\])*"|[A-Za-z_][\w.]*|-?\d+|[{}\[\]:,]', text)
    content, rest = _message(tokens)
    if rest:
        raise UadxError(f"config.pbtxt: unexpected '{rest[0]}'")
    return content


def _message(tokens: list[str]) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    while tokens and tokens[0] != "}":
        name, mark, *tokens = tokens
        if mark == "{":
            item, tokens = _message(tokens)
            found.setdefault(name, []).append(item)
            tokens = tokens[1:]
        elif mark == ":" and tokens[0] == "[":
            end = tokens.index("]")
            found[name] = [_value(token) for token in tokens[1:end] if token != ","]
            tokens = tokens[end + 1 :]
        elif mark == ":":
            found[name] = _value(tokens[0])
            tokens = tokens[1:]
        else:
            raise UadxError(f"config.pbtxt: unexpected '{mark}' after '{name}'")
    return found, tokens


def _value(token: str) -> Any:
    if token.startswith('"'):
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    return int(token) if re.fullmatch(r"-?\d+", token) else token
