"""Silence for the libraries that quantize: what they tell their developers, and progress bars on stdout."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

LOGGERS = ("nncf", "torch.utils._pytree", "torch.utils.cpp_extension", "torch.onnx")


@contextmanager
def quiet_quantizers() -> Iterator[None]:
    """Silence NNCF's progress bars and advice, and deprecations inside libraries that only their authors can mend."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        # torch.jit.TracerWarning is a plain Warning.
        for category in (DeprecationWarning, FutureWarning, UserWarning, RuntimeWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", message=".*(TorchScript|trac|Trac|Python boolean|Iterating over a tensor).*")
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
