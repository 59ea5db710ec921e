"""The configuration section ``trainer``: arguments of Lightning's Trainer, checked before any data is touched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from anomalib.models import AnomalibModule
from lightning.pytorch import Trainer

from uad_plugins.config import TrainConfig, unknown_key
from uad_plugins.errors import UsageError, reason_of
from uad_plugins.models.recipe import DistillationRecipe

COPYING = ("ddp_spawn", "ddp_fork", "ddp_notebook")
"""Strategies, with all their variants, that leave the callbacks of the process that goes on without what they saw."""


EMPTY = {
    "limit_train_batches": "nothing to train on",
    "max_steps": "no step to train",
    "limit_val_batches": "nothing to choose the checkpoint by",
}
"""Arguments that must not be 0, and what it would leave."""


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
    strategy = arguments.get("strategy")
    if isinstance(strategy, str) and strategy.startswith(COPYING):
        raise UsageError(
            f"trainer.strategy: {strategy} trains in copies of this process, which keep what was learnt and measured",
            "use ddp",
        )
    for name, why in EMPTY.items():
        if arguments.get(name) in (0, "0"):
            raise UsageError(f"trainer.{name}: {arguments[name]!r} leaves {why}", "remove it, or give at least 1")
    if arguments.get("val_check_interval") not in (None, 1.0):
        raise UsageError(
            "trainer.val_check_interval: a checkpoint of half an epoch cannot be resumed without showing images twice",
            "use trainer.check_val_every_n_epoch, or data.samples_per_epoch for shorter epochs",
        )
    for name in ("fast_dev_run", "barebones"):
        if arguments.get(name):
            raise UsageError(
                f"trainer.{name} leaves no checkpoint behind: there would be no run",
                "for a short trial use --epochs 1, or trainer.limit_train_batches",
            )
    epochs = arguments.get("max_epochs")
    if epochs is not None and (not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1):
        raise UsageError(f"trainer.max_epochs: must be a whole number of at least 1, not {epochs!r}")


def check_trainer_can_be_built(arguments: Mapping[str, Any]) -> None:
    """Refuse values that Lightning's Trainer refuses on this machine: one is built for trial, and nothing written.

    Args:
        arguments: The whole section, with what the model asks for.

    Raises:
        UsageError: It cannot be built; the message names the argument without which it could.
    """
    reason = _refusal(arguments)
    if reason is None:
        return
    rest = {name: {key: value for key, value in arguments.items() if key != name} for name in arguments}
    culprit = next((name for name in arguments if _refusal(rest[name]) is None), None)
    where = "trainer" if culprit is None else f"trainer.{culprit}: {arguments[culprit]!r}"
    raise UsageError(
        f"{where} cannot be used here: {reason}", "correct or remove it; 'uadx doctor' says what this machine has"
    )


def _refusal(arguments: Mapping[str, Any]) -> str | None:
    """Return why Lightning builds no Trainer of these, in one line; None where it does."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    try:
        Trainer(**{**arguments, **quiet})
    except Exception as error:
        # Wrong types, devices that are not there, packages that are missing: each has an error of its own.
        return reason_of(error)
    return None


def fit_trainer_arguments(config: TrainConfig, model: AnomalibModule, given: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration with the trainer arguments that the model asks for.

    Arguments that were not given explicitly take the model's value. Given ones win for the distillation models, whose
    wishes are defaults; other models cannot be trained in another way than they say (a memory bank is filled in one epoch).

    Args:
        config: Resolved configuration.
        model: The model to be trained.
        given: What the user set explicitly.

    Raises:
        UsageError: A given argument contradicts what the model needs.
    """
    explicit = given.get("trainer") or {}
    fitted = config.model_copy(deep=True)
    for name, value in model.trainer_arguments.items():
        if name not in explicit or explicit[name] == value:
            fitted.trainer[name] = value
        elif not isinstance(model, DistillationRecipe):
            raise UsageError(
                f"{config.model.name} needs trainer.{name} to be {value!r}, not {explicit[name]!r}", "leave it out"
            )
    return fitted
