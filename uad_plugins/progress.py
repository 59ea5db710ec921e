"""How long work says how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with the number of items done and of all items."""


@contextmanager
def counting(what: str) -> Iterator[Progress]:
    """Yield a function that shows on stderr how many of how many are done, the rate and the time left.

    In place on a terminal, a line now and then when piped; nothing when all is done within a moment.
    """
    interactive = sys.stderr.isatty()
    started = said = time.monotonic()
    first: int | None = None
    shown = False

    def update(done: int, total: int) -> None:
        nonlocal said, shown, first
        now = time.monotonic()
        # What was done before, by an interrupted run, tells nothing of the rate.
        first = done - 1 if first is None else first
        if now - said < (0.1 if interactive else 20.0) and not (shown and done == total):
            return
        said, shown = now, True
        rate = (done - first) / max(now - started, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        speed = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
        line = f"{what}: {done}/{total}  {speed}  {duration(left)} left"
        # What is said next begins on a line of its own.
        line = "" if interactive and done == total else line
        sys.stderr.write(f"\r\x1b[K{line}" if interactive else f"{line}\n")
        sys.stderr.flush()

    try:
        yield update
    finally:
        if interactive and shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """Write a duration for people: ``45s``, ``3m 20s``, ``2h 05m``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
