"""Signal handlers that training leaves behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def child_signal_restored() -> Iterator[None]:
    """Put the handler of SIGCHLD back as it was.

    torch's data loader sets one when it starts worker processes and never takes it away. OpenVINO, used later in the same
    process, may leave an alternate signal stack behind that is no longer there: the end of any child process would then be
    a segmentation fault.
    """
    usable = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if usable else None
    try:
        yield
    finally:
        if usable and before is not None:
            signal.signal(signal.SIGCHLD, before)
