"""Training on two CPU processes with Lightning's own strategies."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from lightning.pytorch import Trainer

from uad_plugins.artifacts import Run
from uad_plugins.errors import UadxError
from uad_plugins.models.stfpm import Stfpm
from uad_plugins.models.uninformed_students import processes
from uad_plugins.training.callbacks import HeldOutLoss
from uad_plugins.training.train import datamodule


class Threads:
    """A strategy whose processes are threads, and whose broadcast gives up after half a second."""

    def __init__(self, count):
        self.meeting, self.content = threading.Barrier(count), None

    def of(self, rank):
        parent = self

        class One:
            is_global_zero = rank == 0

            def broadcast(self, content):
                if rank == 0:
                    parent.content = content
                parent.meeting.wait(0.5)
                received = parent.content
                parent.meeting.wait(0.5)
                return received

        return One()

    def run(self, work):
        found = {}

        def one(rank):
            try:
                found[rank] = processes.on_first_process(self.of(rank), work)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def test_processes_wait_longer_than_the_timeout_of_their_group(monkeypatch):
    monkeypatch.setattr(processes, "HEARTBEAT", 0.1)

    def work(beat):
        for _ in range(40):
            time.sleep(0.03)
            beat()
        return "teacher"

    assert Threads(2).run(work) == {0: "teacher", 1: "teacher"}


def test_an_error_of_the_working_process_is_one_of_all():
    for error, said in (
        (UadxError("no image in it", "give another folder"), "no image in it (give another folder)"),
        (RuntimeError("out of memory"), "the first process failed: out of memory"),
    ):

        def work(_beat, error=error):
            raise error

        found = Threads(2).run(work)
        assert found[0] is error
        assert isinstance(found[1], UadxError)
        assert str(found[1]) == said


def validate(model, data, *callbacks):
    """Validate in this process alone."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet).validate(model, data, verbose=False)


@pytest.mark.slow
def test_two_processes_see_the_same_number_of_samples_and_gather_their_metrics(products, tmp_path):
    results = {}
    for devices in (1, 2):
        out = tmp_path / f"run{devices}"
        command = [sys.executable, "-m", "uadx", "train", str(products), "--model", "stfpm", "--weights", "bundled"]
        command += ["--image-size", "64", "--epochs", "2", "--out", str(out), "--json", "--batch-size", str(8 // devices)]
        command += ["--set", "trainer.accelerator=cpu", f"trainer.devices={devices}", "data.val_fraction=0.34"]
        command += ["optimizer.lr=1.0"]
        if devices > 1:
            command += ["trainer.strategy=ddp"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert "sync_dist" not in done.stderr
        results[devices] = json.loads(done.stdout)
        evaluated = subprocess.run(
            [sys.executable, "-m", "uadx", "evaluate", str(out), str(products), "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert evaluated.returncode == 0, evaluated.stderr
        results[devices]["report"] = json.loads(evaluated.stdout)
    one, two = results[1], results[2]
    assert (one["processes"], two["processes"]) == (1, 2)
    # 21 training images: two processes round up to 11 each.
    assert (one["samples_seen"], two["samples_seen"]) == (42, 44)
    # The held-out loss is gathered over both: it is what one process measures of the same checkpoint, product by product.
    for devices in (1, 2):
        found, run = HeldOutLoss(["connector", "fabric", "washer"]), Run(tmp_path / f"run{devices}")
        model = Stfpm.load_from_checkpoint(run.checkpoint, map_location="cpu")
        validate(model, datamodule(run.config(), products), found)
        means = dict(zip(found.categories, found.metric.compute().tolist(), strict=True))
        assert results[devices]["val_loss_per_category"] == pytest.approx(means, rel=1e-3)
        assert results[devices]["best_val_loss"] == pytest.approx(sum(means.values()) / 3, rel=1e-3)
    assert two["report"]["pooled"]["normal"] == one["report"]["pooled"]["normal"] == 12


@pytest.mark.slow
def test_two_processes_distil_the_teachers_once_and_share_their_statistics(products, tmp_path):
    import torch

    from uad_plugins.detector import open_detector

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UADX_CACHE": str(tmp_path / "cache")}
    statistics = {}
    for devices in (2, 1):
        out = tmp_path / f"run{devices}"
        command = [sys.executable, "-m", "uadx", "train", str(products), "--model", "uninformed_students"]
        command += ["--weights", "bundled", "--image-size", "64", "--epochs", "1", "--out", str(out), "--batch-size", "4"]
        options = ["patch_sizes=[17]", "students=2", "width=0.0625", "stride=4", "teacher.steps=4", "teacher.batch_size=8"]
        command += ["--set", "trainer.accelerator=cpu", f"trainer.devices={devices}", "data.val_fraction=0.4"]
        command += [f"model.options.{option}" for option in options]
        if devices > 1:
            command += ["trainer.strategy=ddp"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        with open_detector(out) as detector:
            statistics[devices] = detector.model.model.feature_mean
            assert bool((detector.model.model.score_std > 0).all())
    assert len(list((tmp_path / "cache" / "teachers").glob("*.safetensors"))) == 1
    # 18 training images share out evenly: both see the same pixels.
    assert torch.allclose(statistics[1], statistics[2], rtol=1e-3, atol=1e-5)
