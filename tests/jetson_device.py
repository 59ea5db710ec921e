"""A Jetson that is none: the runner's modules with fakes of TensorRT and pycuda, and a bundle for them to run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from fake_pycuda import FakeDriver
from fake_tensorrt import FakeTensorRT

PACKAGE = "uad_plugins.deployment.jetson.uadx_jetson"
VERSIONS = ["8.6", "10.3", "10.14", "11.4"]
SIZE = (6, 8)
"""Height and width of the network's input."""

TENSORS = {"input": (1, 3, *SIZE), "score": (1, 1), "map": (1, 1, 3, 4)}


@dataclass
class Layer:
    """A layer of the network that the fake parser makes: its name, type, and the names of its tensors."""

    name: str
    kind: str
    inputs: tuple[Any, ...]
    outputs: tuple[str, ...]
    channels: int = 8
    dtype: str = "FLOAT"


# One stage of a quantized student-teacher network: a residual block twice, then the map, which is blurred in the end.
NETWORK = [
    Layer("scale", "CONSTANT", (), ("scale",)),
    Layer("q0", "QUANTIZE", ("input", "scale"), ("q0",)),
    Layer("dq0", "DEQUANTIZE", ("q0", "scale"), ("dq0",)),
    Layer("conv0", "CONVOLUTION", ("dq0", None), ("conv0",)),
    Layer("relu0", "ACTIVATION", ("conv0",), ("relu0",)),
    Layer("q1", "QUANTIZE", ("relu0", "scale"), ("q1",)),
    Layer("dq1", "DEQUANTIZE", ("q1", "scale"), ("dq1",)),
    Layer("conv1", "CONVOLUTION", ("dq1", None), ("conv1",)),
    Layer("bn1", "SCALE", ("conv1",), ("bn1",)),
    Layer("add1", "ELEMENTWISE", ("bn1", "dq1"), ("add1",)),
    Layer("relu1", "ACTIVATION", ("add1",), ("relu1",)),
    Layer("norm", "REDUCE", ("relu1",), ("norm",)),
    Layer("eps", "CONSTANT", (), ("eps",)),
    Layer("floor", "ELEMENTWISE", ("norm", "eps"), ("floor",)),
    Layer("divide", "ELEMENTWISE", ("relu1", "floor"), ("divide",)),
    Layer("size", "SHAPE", ("divide",), ("size",), dtype="INT32"),
    Layer("distance", "REDUCE", ("divide",), ("distance",)),
    Layer("blur", "CONVOLUTION", ("distance",), ("map",), channels=1),
    Layer("largest", "REDUCE", ("map",), ("score",)),
]

HEAD = ["norm", "floor", "divide", "distance", "blur", "largest"]


@dataclass
class Done:
    """What a command gave."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Device:
    """A device with a version of TensorRT.

    Attributes:
        version: Of the surface file.
        bundle: Folder of the bundle.
        network: Layers that the parser makes.
        without: See ``FakeTensorRT``.
        dla_cores: How many there are.
        errors: What the parser complains of: node number, name, operator, description.
        tensors: Shapes of the engine's tensors.
        scores: Added to the score of each image in turn.
        fails: What goes wrong: ``build``, ``load``, ``context``, ``run``, ``address``.
    """

    version: str
    bundle: Path
    network: list[Layer] = field(default_factory=lambda: list(NETWORK))
    without: tuple[str, ...] = ()
    dla_cores: int = 0
    errors: list[tuple[int, str, str, str]] = field(default_factory=list)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(TENSORS))
    dtype: str = "FLOAT"
    fails: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.trt = FakeTensorRT(self.version, self._behaviour(), self.without)
        self.cuda = FakeDriver()
        self._fill_names()

    def run(self, *words: str) -> Done:
        """Run a command of the runner on this device."""
        out, err = io.StringIO(), io.StringIO()
        with self.installed(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            commands = importlib.import_module(PACKAGE + ".commands")
            status = commands.main([words[0], "--bundle", str(self.bundle), *words[1:]])
        return Done(status, out.getvalue(), err.getvalue())

    @contextlib.contextmanager
    def installed(self) -> Any:
        """Let imports find this device's modules, and the runner's be imported anew."""
        fakes = {"tensorrt": self.trt, "pycuda": ModuleType("pycuda"), "pycuda.driver": self.cuda}
        fakes["pycuda"].driver = self.cuda
        before = {name: module for name, module in sys.modules.items() if name in fakes or name.startswith(PACKAGE + ".")}
        for name in before:
            del sys.modules[name]
        sys.modules.update(fakes)
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name in fakes or name.startswith(PACKAGE + ".")]:
                del sys.modules[name]
            sys.modules.update(before)

    def flags(self) -> list[str]:
        """Return the names of the builder flags that were set, sorted."""
        return sorted(flag.name for (flag,) in self.trt.called("IBuilderConfig.set_flag"))

    def _fill_names(self) -> None:
        self._names = list(self.tensors)
        self._layers = [self._layer(layer) for layer in self.network]
        self._timings = b""

    def _layer(self, layer: Layer) -> Any:
        def tensor(name: Any, dtype: str) -> Any:
            shape = (1, layer.channels, 4, 4)
            return name and self.trt.make("ITensor", name=name, dtype=getattr(self.trt.DataType, dtype), shape=shape)

        inputs = [tensor(name, "FLOAT") for name in layer.inputs]
        outputs = [tensor(name, layer.dtype) for name in layer.outputs]
        kind = getattr(self.trt.LayerType, layer.kind)
        return self.trt.make("ILayer", name=layer.name, kind=kind, inputs=inputs, outputs=outputs)

    def _execute(self, addresses: dict[str, int], stream: int) -> bool:
        if "run" in self.fails:
            return False
        dtype = {"FLOAT": np.float32, "HALF": np.float16}[self.dtype]

        def work() -> None:
            pixels = np.frombuffer(self.cuda.memory[addresses["input"]], dtype).astype(np.float64)
            mean = float(pixels.mean())
            self.cuda.memory[addresses["score"]][:] = np.array([mean], dtype).tobytes()
            ramp = mean + np.arange(np.prod(self.tensors["map"]))
            self.cuda.memory[addresses["map"]][:] = ramp.astype(dtype).tobytes()

        self.cuda.streams[stream].add("execute", work)
        return True

    def _behaviour(self) -> dict[str, Any]:
        make = lambda *arguments, **state: self.trt.make(*arguments, **state)  # noqa: E731

        def keep(cache: Any) -> bool:
            fits = cache.state.content in (b"", b"timings")
            self._timings = cache.state.content if fits else self._timings
            return fits

        def address(context: Any, name: str, memory: int) -> bool:
            context.state.addresses[name] = memory
            return "address" not in self.fails

        def bound(context: Any, bindings: Any, stream: int) -> bool:
            return self._execute(dict(zip(self._names, bindings)), stream)

        dtype = lambda *_: getattr(self.trt.DataType, self.dtype)  # noqa: E731
        return {
            "Builder.num_DLA_cores": lambda _: self.dla_cores,
            "Builder.create_network": lambda *_: make("INetworkDefinition"),
            "Builder.create_builder_config": lambda _: make("IBuilderConfig"),
            "Builder.build_serialized_network": lambda *_: None if "build" in self.fails else make("IHostMemory", b"engine"),
            "INetworkDefinition.num_layers": lambda _: len(self._layers),
            "INetworkDefinition.get_layer": lambda _, index: self._layers[index],
            "ILayer.name": lambda layer: layer.state.name,
            "ILayer.type": lambda layer: layer.state.kind,
            "ILayer.num_inputs": lambda layer: len(layer.state.inputs),
            "ILayer.get_input": lambda layer, index: layer.state.inputs[index],
            "ILayer.num_outputs": lambda layer: len(layer.state.outputs),
            "ILayer.get_output": lambda layer, index: layer.state.outputs[index],
            "ITensor.name": lambda tensor: tensor.state.name,
            "ITensor.dtype": lambda tensor: tensor.state.dtype,
            "ITensor.shape": lambda tensor: tensor.state.shape,
            "OnnxParser.parse": lambda *_: not self.errors,
            "OnnxParser.num_errors": lambda _: len(self.errors),
            "OnnxParser.get_error": lambda _, index: make("ParserError", error=self.errors[index]),
            "ParserError.node": lambda error: error.state.error[0],
            "ParserError.node_name": lambda error: error.state.error[1],
            "ParserError.node_operator": lambda error: error.state.error[2],
            "ParserError.desc": lambda error: error.state.error[3],
            "IBuilderConfig.create_timing_cache": lambda _, known: make("ITimingCache", content=known),
            "IBuilderConfig.set_timing_cache": lambda _, cache, ignore_mismatch: keep(cache),
            "IBuilderConfig.get_timing_cache": lambda _: make("ITimingCache"),
            "ITimingCache.serialize": lambda _: make("IHostMemory", b"timings"),
            "Runtime.deserialize_cuda_engine": lambda *_: None if "load" in self.fails else make("ICudaEngine"),
            "ICudaEngine.num_io_tensors": lambda _: len(self._names),
            "ICudaEngine.get_tensor_name": lambda _, index: self._names[index],
            "ICudaEngine.get_tensor_shape": lambda _, name: self.tensors[name],
            "ICudaEngine.get_tensor_dtype": dtype,
            "ICudaEngine.num_bindings": lambda _: len(self._names),
            "ICudaEngine.get_binding_name": lambda _, index: self._names[index],
            "ICudaEngine.get_binding_shape": lambda _, index: self.tensors[self._names[index]],
            "ICudaEngine.get_binding_dtype": dtype,
            "ICudaEngine.create_execution_context": lambda _: (
                None if "context" in self.fails else make("IExecutionContext", addresses={})
            ),
            "IExecutionContext.set_tensor_address": address,
            "IExecutionContext.execute_async_v3": lambda context, stream: self._execute(context.state.addresses, stream),
            "IExecutionContext.execute_async_v2": bound,
        }


def write_bundle(folder: Path, onnx: bytes = b"onnx", **changes: Any) -> Path:
    """Write a bundle; ``changes`` replace keys of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(onnx)
    manifest = {
        "seal": "0" * 64,
        "schema": "uadx.bundle/1",
        "onnx": "model.onnx",
        "input": {"name": "input", "shape": list(TENSORS["input"])},
        "outputs": {"score": "score", "map": "map"},
        "preprocessing": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "resize": "bilinear",
            "antialias": True,
            "color": "RGB",
        },
        "thresholds": {"pooled": {"value": 0.5}, "categories": {"bolt": {"value": -1.0}, "nut": {"value": None}}},
        "files": {"model.onnx": {"sha256": hashlib.sha256(onnx).hexdigest(), "bytes": len(onnx)}},
        **changes,
    }
    blank = json.dumps(manifest)
    (folder / "bundle.json").write_text(blank.replace("0" * 64, hashlib.sha256(blank.encode()).hexdigest(), 1))
    return folder
