"""The GPU and its CUDA context."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

import pycuda.driver as cuda

from .files import RunnerError


@dataclass(frozen=True)
class Gpu:
    """The GPU in use.

    Attributes:
        name: As the driver calls it.
        compute_capability: Such as ``7.2``; an engine runs on no other.
    """

    name: str
    compute_capability: str


@contextmanager
def gpu() -> Iterator[Gpu]:
    """Make a CUDA context on the first GPU for the block.

    Raises:
        RunnerError: There is no GPU, or CUDA fails within the block.
    """
    try:
        cuda.init()
        device = cuda.Device(0)
        context = device.make_context()
        try:
            yield Gpu(device.name(), ".".join(map(str, device.compute_capability())))
        finally:
            context.pop()
            context.detach()
    except cuda.Error as error:
        raise RunnerError(f"CUDA: {error}") from error
