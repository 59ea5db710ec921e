"""Building a TensorRT engine from the bundle's ONNX file, on the device that will run it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

import tensorrt as trt

from .files import RunnerError, write_atomically
from .head import head_layers, is_quantized, keep_in_fp32
from .onnx_nodes import node_names

Note = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose of an engine.

    Attributes:
        fp16: Layers that are not quantized run in FP16, the head in FP32. TensorRT 11 takes the ONNX file's types instead.
        workspace_mib: Most scratch memory a layer may use.
        dla_core: Deep-learning accelerator that takes what it can, the GPU taking the rest; None uses the GPU alone.
    """

    fp16: bool = True
    workspace_mib: int = 1024
    dla_core: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BuildOptions:
        """Read what ``as_dict`` wrote.

        Raises:
            TypeError: It is something else.
        """
        return cls(**content)


@dataclass(frozen=True)
class Plan:
    """A built engine, not loaded.

    Attributes:
        content: The serialized engine, a buffer.
        trtexec: The command that would build an equal one.
    """

    content: Any
    trtexec: str


def strongly_typed() -> bool:
    """Tell whether this TensorRT takes precisions from the network's types alone, as 11 does."""
    return not hasattr(trt.BuilderFlag, "FP16")


def build_plan(onnx: Path, engine: Path, options: BuildOptions, timing_cache: Path, note: Note, base: Path) -> Plan:
    """Build an engine.

    Args:
        onnx: The network.
        engine: Where the engine will be written, for the ``trtexec`` line.
        options: What to build.
        timing_cache: File with timings of earlier builds; read if it fits, and written.
        note: Told what the user should know.
        base: Folder in which the ``trtexec`` line is to be run: what lies below it is named from there.

    Raises:
        RunnerError: TensorRT cannot parse the network or build it, or there is no such DLA core.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    if options.dla_core is not None and options.dla_core >= builder.num_DLA_cores:
        raise RunnerError(f"no DLA core {options.dla_core}: this device has {builder.num_DLA_cores}")
    if options.dla_core is not None and not options.fp16:
        raise RunnerError("DLA computes in FP16 or INT8: --dla-core and --no-fp16 exclude each other")
    network = builder.create_network(_network_flags())
    # The parser owns the weights: it must live until the engine is built.
    parser = trt.OnnxParser(network, logger)
    _parse(parser, onnx)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    quantized = is_quantized(network)
    head = [] if strongly_typed() else _set_precisions(config, network, options, quantized)
    if options.dla_core is not None:
        _use_dla(config, options.dla_core, quantized, note)
    _load_timings(config, timing_cache, note)
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise RunnerError(f"{onnx}: TensorRT {trt.__version__} could not build an engine; its messages are above")
    write_atomically(timing_cache, config.get_timing_cache().serialize())
    places = [_below(path, base) for path in (onnx, engine, timing_cache)]
    return Plan(content, trtexec_line(places[0], places[1], options, places[2], quantized, head))


def _below(path: Path, base: Path) -> Path:
    """Return a path as seen from a folder: a bundle may be moved, and its engine with it."""
    path, base = path.resolve(), base.resolve()
    return path.relative_to(base) if base in path.parents else path


def _network_flags() -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    if strongly_typed():
        return 1 << int(kinds.STRONGLY_TYPED)
    # Without it TensorRT 8 makes a network of implicit batch, which the parser refuses. It has no effect in 10.
    return 1 << int(kinds.EXPLICIT_BATCH) if hasattr(kinds, "EXPLICIT_BATCH") else 0


def _parse(parser: Any, onnx: Path) -> None:
    model = onnx.read_bytes()
    if parser.parse(model):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    names = node_names(model)
    reasons = [f"{_place(error, names)}: {' '.join(str(error.desc()).split())}" for error in errors]
    raise RunnerError(
        f"{onnx}: TensorRT {trt.__version__} cannot take this network: {'; '.join(reasons) or 'no reason given'}"
    )


def _place(error: Any, names: list[str]) -> str:
    if hasattr(error, "node_name") and error.node_name():
        return f"node {error.node_name()} ({error.node_operator()})"
    number = error.node()
    return f"node {names[number]}" if 0 <= number < len(names) else f"node number {number}"


def _set_precisions(config: Any, network: Any, options: BuildOptions, quantized: bool) -> list[Any]:
    if quantized:
        config.set_flag(trt.BuilderFlag.INT8)
    if not options.fp16:
        return []
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    head = head_layers(network)
    for layer in head:
        keep_in_fp32(layer)
    return head


def _use_dla(config: Any, core: int, quantized: bool, note: Note) -> None:
    if quantized:
        note("note: DLA takes no quantization nodes; what they touch runs on the GPU")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _load_timings(config: Any, path: Path, note: Note) -> None:
    known = path.read_bytes() if path.is_file() else b""
    if known:
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        note(f"note: {path} is of another device or version; timing everything anew")
    config.set_timing_cache(config.create_timing_cache(b""), False)


def trtexec_line(
    onnx: Path, engine: Path, options: BuildOptions, timing_cache: Path, quantized: bool, head: list[Any]
) -> str:
    """Return the ``trtexec`` command that builds an equal engine with the TensorRT that is installed.

    Args:
        onnx: The network.
        engine: File it saves.
        options: What to build.
        timing_cache: File with timings.
        quantized: The network has quantization nodes.
        head: Layers kept in FP32.
    """
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", f"--timingCacheFile={timing_cache}"]
    words.append(f"--memPoolSize=workspace:{options.workspace_mib}")
    if not strongly_typed():
        words += ["--int8"] * quantized + ["--fp16"] * options.fp16
    if head:
        words.append("--precisionConstraints=obey")
        words.append("--layerPrecisions=" + ",".join(f"{layer.name}:fp32" for layer in head))
        words.append(
            "--layerOutputTypes=" + ",".join(layer.name + ":" + "+".join(["fp32"] * layer.num_outputs) for layer in head)
        )
    if options.dla_core is not None:
        words += [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
    # Renamed in 8.6.
    words.append("--skipInference" if _version() >= (8, 6) else "--buildOnly")
    return " ".join(map(shlex.quote, words))


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in trt.__version__.split(".")[:2])
