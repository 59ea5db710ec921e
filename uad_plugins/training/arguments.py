"""The configuration section ``trainer``: arguments of Lightning's Trainer, checked before any data is touched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from uad_plugins.config import unknown_key
from uad_plugins.errors import UsageError


def check_trainer_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that Lightning's Trainer does not take or that uadx sets itself.

    Raises:
        UsageError: See above; the message has the nearest argument that there is.
    """
    own = {
        "self",
        "callbacks",
        "logger",
        "plugins",
        "default_root_dir",
        "enable_checkpointing",
        "use_distributed_sampler",
    }
    known = set(inspect.signature(Trainer.__init__).parameters) - own
    for name in arguments:
        if name in own:
            raise UsageError(f"trainer.{name} is set by uadx itself", "remove it from the configuration")
        if name not in known:
            raise unknown_key(["trainer", name], {f"trainer.{key}" for key in known})
    epochs = arguments.get("max_epochs")
    if epochs is not None and (not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1):
        raise UsageError(f"trainer.max_epochs: must be a whole number of at least 1, not {epochs!r}")
