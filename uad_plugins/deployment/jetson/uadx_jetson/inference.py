"""Running the engine: two lanes, each with its own stream and buffers, so that copies and kernels overlap."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Callable

import numpy as np
import pycuda.driver as cuda
import tensorrt as trt

from .bundle import Bundle
from .files import RunnerError

LANES = 2

Fill = Callable[[Any], None]


class Session:
    """An engine ready to run, with everything it needs allocated once.

    Args:
        engine: TensorRT engine, see ``load_engine``.
        bundle: Names and shape of its tensors.

    Raises:
        RunnerError: The engine's tensors are not the bundle's.
    """

    def __init__(self, engine: Any, bundle: Bundle) -> None:
        self.lanes: list[Lane] = []
        try:
            for _ in range(LANES):
                self.lanes.append(Lane(engine, bundle))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory of the device back; must happen while its CUDA context is there."""
        for lane in self.lanes:
            lane.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Lane:
    """One image under way: its stream, its pinned host memory and its memory on the device.

    Args:
        engine: TensorRT engine.
        bundle: Names and shape of its tensors.
    """

    def __init__(self, engine: Any, bundle: Bundle) -> None:
        tensors = _Tensors(engine)
        shapes = {name: tensors.shape(name) for name in (bundle.input_name, bundle.score_name, bundle.map_name)}
        expected = (1, 3, bundle.height, bundle.width)
        if shapes[bundle.input_name] != expected:
            raise RunnerError(f"the engine's input is {shapes[bundle.input_name]}, the bundle's {expected}")
        if int(np.prod(shapes[bundle.score_name])) != 1 or len(shapes[bundle.map_name]) < 2:
            raise RunnerError(f"the engine's outputs are {shapes}: not one score and one map")
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RunnerError("TensorRT could not make an execution context; is the device's memory full?")
        self._stream = cuda.Stream()
        # Pinned: only then does a copy run beside the kernels. pycuda makes no arrays without dimensions.
        self._host = {name: cuda.pagelocked_empty(shape or (1,), tensors.dtype(name)) for name, shape in shapes.items()}
        self._device: dict[str, Any] = {}
        self._input, self._score, self._map = bundle.input_name, bundle.score_name, bundle.map_name
        try:
            for name, array in self._host.items():
                self._device[name] = cuda.mem_alloc(array.nbytes)
            self._execute = tensors.bind(self._context, {name: int(memory) for name, memory in self._device.items()})
        except BaseException:
            self._free()
            raise

    def submit(self, fill: Fill) -> None:
        """Start an image; returns before it is done. The one before must have been fetched.

        Args:
            fill: Writes the normalised image into the float32 array ``(1, 3, H, W)`` that it is given.

        Raises:
            RunnerError: TensorRT refuses.
        """
        fill(self._host[self._input])
        cuda.memcpy_htod_async(self._device[self._input], self._host[self._input], self._stream)
        if not self._execute(self._stream.handle):
            raise RunnerError("TensorRT could not run the engine; its messages are above")
        for name in (self._score, self._map):
            cuda.memcpy_dtoh_async(self._host[name], self._device[name], self._stream)

    def fetch(self) -> tuple[float, Any]:
        """Wait for the image; returns its score and its map, float32 ``(h, w)``."""
        self._stream.synchronize()
        anomaly_map = self._host[self._map]
        # The buffer takes the next image: the map must be a copy.
        return float(self._host[self._score].reshape(())), np.array(anomaly_map.reshape(anomaly_map.shape[-2:]), np.float32)

    def close(self) -> None:
        """Wait for what is under way and free the device's memory."""
        self._stream.synchronize()
        # TensorRT's context must go while there is a CUDA context.
        del self._execute, self._context
        self._free()

    def _free(self) -> None:
        for memory in self._device.values():
            memory.free()
        self._device, self._host = {}, {}


class _Tensors:
    """The engine's tensors by name: by the tensor functions of 8.5 and newer, or the numbered bindings before."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._named = hasattr(engine, "num_io_tensors")
        if self._named:
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        else:
            names = [engine.get_binding_name(index) for index in range(engine.num_bindings)]
        self._numbers = {name: index for index, name in enumerate(names)}

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._numbers:
            raise RunnerError(f"the engine has no tensor '{name}', only: {', '.join(self._numbers)}")
        engine = self._engine
        return tuple(engine.get_tensor_shape(name) if self._named else engine.get_binding_shape(self._numbers[name]))

    def dtype(self, name: str) -> Any:
        engine = self._engine
        kind = engine.get_tensor_dtype(name) if self._named else engine.get_binding_dtype(self._numbers[name])
        # Not trt.nptype: that of TensorRT 8 fails with numpy 1.24 and newer.
        for known, dtype in ((trt.float32, np.float32), (trt.float16, np.float16)):
            if kind == known:
                return dtype
        raise RunnerError(f"the engine's tensor '{name}' is {kind}: this runner knows float32 and float16")

    def bind(self, context: Any, addresses: dict[str, int]) -> Callable[[int], bool]:
        """Give a context its memory; returns what runs it on a stream's handle."""
        missing = sorted(set(self._numbers) - set(addresses))
        if missing:
            raise RunnerError(f"the engine has tensors that the bundle does not name: {', '.join(missing)}")
        if self._named:
            for name, address in addresses.items():
                if not context.set_tensor_address(name, address):
                    raise RunnerError(f"TensorRT refuses the memory of tensor '{name}'")
            return lambda stream: bool(context.execute_async_v3(stream))
        bindings = [addresses[name] for name in self._numbers]
        return lambda stream: bool(context.execute_async_v2(bindings, stream))
