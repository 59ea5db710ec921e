"""How long work says how far it is."""

import io
import itertools
from types import SimpleNamespace

import pytest
import torch

from uad_plugins import progress
from uad_plugins.training import callbacks


def test_on_a_terminal_the_count_leaves_its_line_when_all_is_done(monkeypatch):
    """What is said next, within the block, is not written behind it."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, clock = Terminal(), itertools.count()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.counting("images") as update:
        update(1, 2)
        assert terminal.getvalue().startswith("\r\x1b[Kimages: 1/2")
        update(2, 2)
        assert terminal.getvalue().endswith("\r\x1b[K")


@pytest.fixture
def training(monkeypatch):
    """Two epochs of three batches of four images, a second each: what runs a callback, and the trainer it sees."""
    clock = itertools.count()
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: float(next(clock)))
    trainer = SimpleNamespace(
        is_global_zero=True,
        world_size=1,
        num_training_batches=3,
        max_epochs=2,
        max_steps=-1,
        accumulate_grad_batches=1,
        current_epoch=0,
        callback_metrics={},
    )

    def run(callback, batches):
        callback.on_train_start(trainer, None)
        for done in range(batches):
            trainer.current_epoch, index = divmod(done, 3)
            trainer.callback_metrics = {"val_loss": torch.tensor(0.5)} if trainer.current_epoch else {}
            callback.on_train_batch_end(trainer, None, None, SimpleNamespace(image=torch.zeros(4, 3, 2, 2)), index)

    return run, trainer


def test_a_piped_training_says_rate_and_time_left_now_and_then(training, capsys):
    run, trainer = training
    callback = callbacks.TrainingProgress(interactive=False, every=2)
    run(callback, 6)
    callback.on_train_end(trainer, None)
    assert capsys.readouterr().err == (
        "epoch 1/2  4.0 images/s  4s left\nepoch 2/2  4.0 images/s  2s left  val_loss 0.5\n"
        "epoch 2/2  4.0 images/s  0s left  val_loss 0.5\n"
    )


@pytest.mark.parametrize("epochs", [-1, 5])
def test_a_training_of_so_many_steps_says_when_these_are_done(training, capsys, epochs):
    run, trainer = training
    trainer.max_epochs, trainer.max_steps, trainer.accumulate_grad_batches = epochs, 2, 2
    run(callbacks.TrainingProgress(interactive=False, every=2), 4)
    assert capsys.readouterr().err == "epoch 1/2  4.0 images/s  2s left\nepoch 2/2  4.0 images/s  0s left  val_loss 0.5\n"


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_on_a_terminal_a_bar_says_it_and_goes_at_the_end(training, monkeypatch, capsys, end):
    run, trainer = training
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    callback = callbacks.TrainingProgress(interactive=True)
    run(callback, 4)
    getattr(callback, end)(trainer, None, *([KeyboardInterrupt()] if end == "on_exception" else []))
    said = capsys.readouterr().err
    assert "67%" in said
    assert "4.0 images/s" in said
    assert "2s left" in said
    # The cursor, hidden while the bar moves, is back.
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")


def test_other_processes_of_a_training_are_quiet(training, capsys):
    run, trainer = training
    trainer.is_global_zero = False
    run(callbacks.TrainingProgress(interactive=True, every=0), 6)
    assert capsys.readouterr().err == ""
