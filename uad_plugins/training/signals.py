"""Signals while data loaders run worker processes."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SS_DISABLE = 2
"""Of ``sigaltstack`` on Linux: there is no alternate stack."""


class SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def child_signal_restored() -> Iterator[None]:
    """Take signals of child processes on the ordinary stack, and put the handler of SIGCHLD back as it was.

    torch's data loader sets a handler when it starts worker processes and never takes it away. OpenVINO, used before or
    after in the same process, may leave an alternate signal stack behind that is no longer there: the end of any child
    process would then be a segmentation fault.
    """
    usable = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if usable else None
    if usable:
        no_alternate_stack()
    try:
        yield
    finally:
        if usable and before is not None:
            signal.signal(signal.SIGCHLD, before)


def no_alternate_stack() -> None:
    """Have this thread take its signals on the ordinary stack; on other systems than Linux nothing is done."""
    if sys.platform != "linux":
        return
    # Refused while a signal is handled on it; then it is there.
    ctypes.CDLL(None).sigaltstack(ctypes.byref(SignalStack(None, SS_DISABLE, 0)), None)
