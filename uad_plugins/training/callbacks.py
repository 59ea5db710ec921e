"""What watches a training: the held-out loss, diverging losses, and progress."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torchmetrics import Metric

from uad_plugins.errors import UadxError
from uad_plugins.progress import duration
from uad_plugins.training.checkpointing import MONITOR


class MeanPerCategory(Metric):
    """Mean of a value over the images of each category, gathered over all processes.

    Args:
        categories: Number of categories.
    """

    full_state_update = False
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(categories, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(categories, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: torch.Tensor, categories: torch.Tensor) -> None:
        """Add values ``(B,)`` of images of the given categories ``(B,)``, int64."""
        self.total.index_add_(0, categories, values.double())
        self.count.index_add_(0, categories, torch.ones_like(values, dtype=torch.float64))

    def compute(self) -> torch.Tensor:
        """Return the mean of each category, float64 ``(C,)``; NaN where there was no image."""
        return self.total / torch.where(self.count > 0, self.count, torch.nan)


class HeldOutLoss(Callback):
    """Logs the loss on held-out normal images as ``val_loss``: the mean over categories of the mean of each.

    Models that report no loss for each image (see ``DistillationRecipe.held_out_loss``) are judged by the anomaly score of
    the normal images, which falls as well.
    """

    def __init__(self, categories: list[str]) -> None:
        self.categories = categories
        self.metric = MeanPerCategory(len(categories))
        self.best: dict[str, Any] = {"val_loss": None, "epoch": 0, "categories": {}}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh on the module's device."""
        self.metric.to(pl_module.device)
        self.metric.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the normal images of a batch."""
        values = getattr(pl_module, "held_out_loss", None)
        if values is None:
            values = batch.pred_score if batch.pred_score is not None else batch.anomaly_map.flatten(1).amax(dim=1)
        normal = ~batch.gt_label.bool() if batch.gt_label is not None else torch.ones(len(values), dtype=torch.bool)
        self.metric.update(values.detach().reshape(-1)[normal], batch.category_index[normal])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean over categories."""
        # torchmetrics makes a single category a scalar.
        means = self.metric.compute().reshape(-1)
        known = means[~torch.isnan(means)]
        value = known.mean() if len(known) else torch.tensor(float("nan"), device=pl_module.device)
        # Every process has the same value already.
        pl_module.log(MONITOR, value.float(), sync_dist=False, prog_bar=True)
        # As the checkpoint callback sees it, so that both agree on which epoch is the best.
        loss = float(value.float())
        if (
            trainer.state.fn == "fit"
            and not trainer.sanity_checking
            and math.isfinite(loss)
            and (self.best["val_loss"] is None or loss < self.best["val_loss"])
        ):
            each = {n: float(v) for n, v in zip(self.categories, means, strict=True) if not math.isnan(float(v))}
            self.best = {"val_loss": loss, "epoch": trainer.current_epoch + 1, "categories": each}

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far for the checkpoint."""
        return dict(self.best)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best epoch so far from a checkpoint."""
        self.best = dict(state_dict)


class SampleCount(Callback):
    """Counts the training images seen over all processes, and the seconds of training; kept in checkpoints."""

    def __init__(self) -> None:
        self.seen = 0
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training, interruptions left out."""
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self.seen += len(batch.image) * trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """Return the count for the checkpoint."""
        return {"seen": self.seen, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count from a checkpoint."""
        self.seen, self._before = state_dict["seen"], state_dict["seconds"]


class FiniteLoss(Callback):
    """Stops a training whose loss is no number any more.

    Args:
        remedy: What to do about it, for the message.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of a batch."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor) and not bool(torch.isfinite(loss).all()):
            raise UadxError(
                f"the loss became {float(loss.detach().sum())} in epoch {trainer.current_epoch + 1}",
                f"{self.remedy}; the checkpoints written so far in {trainer.default_root_dir} are whole",
            )


class TrainingProgress(Callback):
    """Progress with rate and time left: a bar on a terminal, a line now and then when piped.

    Args:
        interactive: Show a bar; None decides by whether stderr is a terminal.
        every: Seconds between lines when piped.
    """

    def __init__(self, interactive: bool | None = None, every: float = 30.0) -> None:
        self.interactive = sys.stderr.isatty() if interactive is None else interactive
        self.every = every
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._said = 0.0
        self._images = 0
        self._batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._started = self._said = time.monotonic()
        self._images = self._batches = 0
        if self.interactive and trainer.is_global_zero:
            from rich.console import Console

            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}  {task.fields[left]}  {task.fields[loss]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total(trainer), epoch="", rate="", left="", loss="")
            self._bar.start()

    @staticmethod
    def _total(trainer: Trainer) -> int:
        """Return the number of batches until the training ends, by its epochs or its steps."""
        limits = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(trainer.max_epochs * int(trainer.num_training_batches))
        if trainer.max_steps >= 0:
            limits.append(trainer.max_steps * trainer.accumulate_grad_batches)
        return min(limits, default=int(trainer.num_training_batches))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        self._images += len(batch.image) * trainer.world_size
        self._batches += 1
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if self._bar is None and (now - self._said < self.every):
            return
        seconds = max(now - self._started, 1e-9)
        done = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
        total = self._total(trainer)
        left = max(0, total - done) * seconds / self._batches
        epoch = f"{trainer.current_epoch + 1}/{math.ceil(total / int(trainer.num_training_batches))}"
        rate, remaining = f"{self._images / seconds:.1f} images/s", f"{duration(left)} left"
        loss = trainer.callback_metrics.get(MONITOR)
        shown = f"{MONITOR} {float(loss):.4g}" if loss is not None else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, epoch=epoch, rate=rate, left=remaining, loss=shown)
        else:
            self._said = now
            sys.stderr.write(f"epoch {epoch}  {rate}  {remaining}  {shown}".rstrip() + "\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the bar."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
