"""Long work that one of several training processes does for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from uad_plugins.errors import UadxError, reason_of

HEARTBEAT = 20.0
"""Seconds after which the working process lets the others know."""

Result = TypeVar("Result")


def on_first_process(strategy: Any, work: Callable[[Callable[[], None]], Result]) -> Result:
    """Do work on the first process and return its result on all of them.

    The others do not wait at a barrier, which gives up after the timeout of the process group (half an hour by default), but
    take part in an exchange every ``HEARTBEAT`` seconds. They need no file of the first one.

    Args:
        strategy: Lightning's strategy.
        work: Called on the first process, with a function that it must call often.

    Raises:
        UadxError: The work failed; on the other processes whatever it failed by.
    """
    if not strategy.is_global_zero:
        while (message := strategy.broadcast(None)) is None:
            pass
        result, error = message
        if error is not None:
            raise error
        return result
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= HEARTBEAT:
            strategy.broadcast(None)
            last = time.monotonic()

    try:
        result = work(beat)
    except Exception as error:
        known = error if isinstance(error, UadxError) else UadxError(f"the first process failed: {reason_of(error)}")
        strategy.broadcast((None, known))
        raise
    strategy.broadcast((result, None))
    return result
