"""``pycuda.driver`` without a GPU: memory is bytes, and a stream does nothing until it is waited for.

So whoever reads a result before synchronising, or fills a buffer that is still to be copied, gets wrong numbers.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable

import numpy as np


class FakeDriver(ModuleType):
    """The module, with the functions that the runner uses and their signatures.

    Args:
        fails: ``cuda.init`` finds no device.
    """

    class Error(Exception):
        """Base of pycuda's errors."""

    def __init__(self, fails: bool = False, name: str = "Orin", capability: tuple[int, int] = (8, 7)) -> None:
        super().__init__("pycuda.driver")
        self.fails, self.name, self.capability = fails, name, capability
        self.log: list[tuple[str, int]] = []
        self.memory: dict[int, bytearray] = {}
        self.pinned: list[int] = []
        self.streams: dict[int, Stream] = {}
        self.contexts = 0
        self.Device = lambda number: Device(self)
        self.Stream = lambda flags=0: Stream(self)

    def init(self, flags: int = 0) -> None:
        if self.fails:
            raise self.Error("cuInit failed: no CUDA-capable device is detected")

    def pagelocked_empty(self, shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        self._need_context()
        assert len(shape) > 0, "pycuda makes no arrays without dimensions"
        self.log.append(("pin", 0))
        array = np.full(shape, np.nan, dtype, order)
        self.pinned.append(array.ctypes.data)
        return array

    def mem_alloc(self, nbytes: int) -> Any:
        self._need_context()
        self.log.append(("allocate", 0))
        return Allocation(self, nbytes)

    def mem_get_info(self) -> tuple[int, int]:
        self._need_context()
        return 3 << 30, 8 << 30

    def memcpy_htod_async(self, dest: Any, src: Any, stream: Any) -> None:
        self._check(src)
        stream.add("to device", lambda: self.memory[int(dest)].__setitem__(slice(None), src.tobytes()))

    def memcpy_dtoh_async(self, dest: Any, src: Any, stream: Any) -> None:
        self._check(dest)

        def copy() -> None:
            dest[...] = np.frombuffer(bytes(self.memory[int(src)]), dest.dtype).reshape(dest.shape)

        stream.add("to host", copy)

    def _check(self, array: Any) -> None:
        assert array.ctypes.data in self.pinned, "an asynchronous copy needs pinned memory"

    def _need_context(self) -> None:
        if not self.contexts:
            raise self.Error("no context is current")


class Device:
    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver

    def name(self) -> str:
        return self._driver.name

    def compute_capability(self) -> tuple[int, int]:
        return self._driver.capability

    def make_context(self, flags: int = 0) -> Any:
        self._driver.contexts += 1
        return Context(self._driver)


class Context:
    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver

    def pop(self) -> None:
        self._driver.contexts -= 1

    def detach(self) -> None:
        assert not self._driver.memory, "memory of the device was not freed before its context went"


class Stream:
    def __init__(self, driver: FakeDriver) -> None:
        driver._need_context()
        self._driver = driver
        self._waiting: list[Callable[[], None]] = []
        self.handle = 1000 + len(driver.streams)
        driver.streams[self.handle] = self

    def add(self, what: str, work: Callable[[], None]) -> None:
        self._driver.log.append((what, self.handle - 1000))
        self._waiting.append(work)

    def synchronize(self) -> None:
        self._driver.log.append(("synchronize", self.handle - 1000))
        for work in self._waiting:
            work()
        self._waiting = []


class Allocation:
    def __init__(self, driver: FakeDriver, nbytes: int) -> None:
        self._driver = driver
        self._address = 1 + max(driver.memory, default=0)
        driver.memory[self._address] = bytearray(nbytes)

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        del self._driver.memory[self._address]
