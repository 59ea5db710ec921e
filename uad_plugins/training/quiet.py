"""Silence for libraries that talk to whoever runs uadx about themselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = tuple(
    f"{package}{module}"
    # Lightning exists under two names, and whichever is imported last takes over the notices of both.
    for package in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning_fabric",
        "pytorch_lightning",
        "anomalib",
    )
    for module in ("", ".utilities.rank_zero")
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence Lightning's hints and notices, which say nothing to whoever runs uadx; warnings of substance stay."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for pattern in (
            ".*does not have many workers.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*number of training batches.*smaller than the logging interval.*",
            ".*The dirpath has changed.*",
            ".*torch.jit.*",
            ".*no positive samples.*",
            ".*does not contain any anomalous.*",
            ".*found 0 .*in.*eval mode.*",
            ".*Found .* module.*in eval mode.*",
            ".*LeafSpec.*",
            ".*isinstance.treespec.*",
            ".*pin_memory.*",
            # A memory bank is filled without an optimizer.
            ".*configure_optimizers. returned .None.*",
            ".*Trying to infer the `batch_size`.*",
            # val_loss is gathered already; the log has the train_loss of the first of several processes.
            ".*recommended to use .self.log.*sync_dist=True.*",
        ):
            warnings.filterwarnings("ignore", message=pattern)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
