"""Killed trainings: nothing half-written is read, and resuming ends where an unbroken training does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image
from runs import small_config, small_run

from uad_plugins import artifacts
from uad_plugins.artifacts import Run, atomic_path, read_json, sha256_of, write_text
from uad_plugins.config import to_yaml
from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import hold_out
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models.backbones import BUNDLED_FILE
from uad_plugins.training.checkpointing import AtomicCheckpointIO
from uad_plugins.training.run_folder import check_folder, resumed_config
from uad_plugins.training.train import train

EPOCHS = {"trainer": {"max_epochs": 4}}
# With synthetic anomalies, which have to be those of the unbroken training too.
DRAWN = {**EPOCHS, "model": {"options": {"synthetic_anomalies": 0.5}}}


def scores_of(run, data):
    with open_detector(run) as detector:
        paths = sorted(str(path) for path in (data / "washer" / "test").rglob("*.png"))
        return [prediction.score for prediction in detector.stream(paths)]


class Killed(BaseException):
    """Stands for the process going away: nothing of ours catches it."""


@contextmanager
def killed_while(monkeypatch, name, time=1):
    """The process goes away in the middle of a file's n-th writing."""
    whole, begun = artifacts.write_bytes, []

    def cut(path, content):
        begun.append(path.name)
        if path.name == name and begun.count(name) == time:
            (path.parent / f".{path.name}.x.part").write_bytes(content[:9])
            raise Killed
        whole(path, content)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(artifacts, "write_bytes", cut)
        yield


@pytest.fixture(scope="module")
def unbroken(products, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    metrics = small_run(products, out, DRAWN)
    return out, metrics


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5, 6, 7])
def test_killed_while_a_checkpoint_is_written(products, unbroken, tmp_path, monkeypatch, write):
    """The n-th write of a checkpoint is cut in the middle; the best (when it is) and the last are written in turn."""
    count = 0
    whole = AtomicCheckpointIO.save_checkpoint

    def cut(self, checkpoint, path, storage_options=None):
        nonlocal count
        count += 1
        if count == write:
            with atomic_path(Path(path)) as temporary:
                temporary.write_bytes(b"half a check")
                raise Killed
        whole(self, checkpoint, path, storage_options)

    with monkeypatch.context() as patched:
        patched.setattr(AtomicCheckpointIO, "save_checkpoint", cut)
        with pytest.raises(Killed):
            small_run(products, tmp_path / "run", DRAWN)
    with pytest.raises(UadxError, match="not finished"):
        Run.open(tmp_path / "run")
    metrics = small_run(products, tmp_path / "run", DRAWN, resume=True)
    out, expected = unbroken
    assert metrics["epochs"] == 4
    assert metrics["samples_seen"] == expected["samples_seen"]
    assert scores_of(tmp_path / "run", products) == pytest.approx(scores_of(out, products), rel=1e-4)


@pytest.mark.parametrize("write", ["thresholds.json", "metrics.json", "run.json"])
def test_killed_after_the_last_epoch(products, unbroken, tmp_path, monkeypatch, write):
    """While the run is finished: thresholds, figures, and what says that it is."""
    with killed_while(monkeypatch, write, time=2 if write == "run.json" else 1):
        small_run(products, tmp_path / "run", DRAWN)
    with pytest.raises(UadxError, match="not finished"):
        Run.open(tmp_path / "run")
    metrics = small_run(products, tmp_path / "run", DRAWN, resume=True)
    out, expected = unbroken
    assert (metrics["epochs"], metrics["best_val_loss"]) == (4, expected["best_val_loss"])
    assert scores_of(tmp_path / "run", products) == scores_of(out, products)
    assert not list((tmp_path / "run").glob(".*.part"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(Killed), atomic_path(target) as temporary:
        temporary.write_text("ne")
        raise Killed
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_unfinished_run_asks_to_be_resumed(products, trained, tmp_path):
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    run.write_manifest(run.manifest().model_copy(update={"status": "training"}))
    with pytest.raises(UadxError, match="holds an unfinished run") as error:
        small_run(products, run.folder)
    assert "--resume" in error.value.hint


def test_killed_before_the_first_checkpoint(products, unbroken, tmp_path):
    """There is a manifest and nothing to resume from: training begins anew."""
    out, _ = unbroken
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    shutil.copy(out / "config.yaml", run.folder)
    run.write_manifest(Run(out).manifest().model_copy(update={"status": "training"}))
    train(small_config(DRAWN), products, run.folder, resume=True, interactive=False)
    assert scores_of(run.folder, products) == scores_of(out, products)


@pytest.mark.parametrize("write", ["skipped.json", "config.yaml", "split.json", "run.json"])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_killed_while_the_folder_is_made_ready(products, tmp_path, monkeypatch, write, options):
    with killed_while(monkeypatch, write):
        small_run(products, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    check_folder(Run(tmp_path / "run"), **{"resume": False, "overwrite": False, **options})
    if write == "run.json":
        assert small_run(products, tmp_path / "run", {"trainer": {"max_epochs": 1}}, **options)["epochs"] == 1


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "mine: 1"},
        {"config.yaml": "seed: 1"},
        {"config.yaml": "mine: 1", "skipped.json": "{}"},
        {"config.yaml": "seed: 1", "skipped.json": "{}", "logs": "mine"},
        {".part": ""},
    ],
)
def test_a_folder_that_only_resembles_a_start_is_not_touched(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if ".part" in files:
        (tmp_path / "thesis.part").touch()
    with pytest.raises(UadxError, match="is not empty and holds no run"):
        check_folder(Run(tmp_path), resume=False, overwrite=False)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "stfpm"},
        {"name": "reverse_distillation"},
        {
            "name": "uninformed_students",
            "options": {"patch_sizes": [33], "students": 2, "width": 0.25, "stride": 4, "train_stride": 4},
        },
    ],
)
def test_resuming_needs_no_weights_but_the_checkpoint(products, tmp_path, model):
    weights = tmp_path / "resnet18.safetensors"
    shutil.copy(BUNDLED_FILE, weights)
    over = {"model": {**model, "weights": str(weights)}, "trainer": {"max_epochs": 1}}
    if model["name"] == "uninformed_students":
        over["model"]["options"]["teacher"] = {"steps": 2, "batch_size": 4, "layer": 3}
    try:
        small_run(products, tmp_path / "run", over)
    finally:
        weights.unlink()
    before = Run(tmp_path / "run").manifest().weights
    given = {"trainer": {"max_epochs": 2}}
    metrics = train(small_config({**over, **given}), products, tmp_path / "run", given=given, resume=True, interactive=False)
    assert metrics["epochs"] == 2
    assert Run(tmp_path / "run").manifest().weights == before
    assert Run(tmp_path / "run").config().model.weights == str(weights)


def test_an_image_that_became_unreadable_can_be_left_out(products, trained, tmp_path):
    run, data = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(products, tmp_path / "data")
    table = hold_out(scan(data), 0.1, 0)
    victim = Path(table.paths[int(table.where(split="train")[0])])
    victim.write_bytes(b"")
    given = {"trainer": {"max_epochs": 3}}
    with pytest.raises(UadxError) as error:
        train(small_config(given), data, run, given=given, resume=True, interactive=False)
    assert "--skip-bad" in error.value.hint
    given["data"] = {"skip_bad": True}
    metrics = train(small_config(given), data, run, given=given, resume=True, interactive=False)
    assert (metrics["epochs"], metrics["samples_seen"]) == (3, 54 + 26)
    assert read_json(run / "skipped.json") == {str(victim): "empty file"}


def test_a_finished_run_is_not_resumed_for_fewer_epochs(products, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    given = {"trainer": {"max_epochs": 1}}
    with pytest.raises(UsageError) as error:
        train(small_config(given), products, run, given=given, resume=True, interactive=False)
    assert error.value.message == f"{run}: 2 epochs are trained already, not 1"
    assert error.value.hint.startswith("give --epochs 2 or more")
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    given = {"trainer": {"max_epochs": 2}}
    assert train(small_config(given), products, run, given=given, resume=True, interactive=False)["epochs"] == 2


def test_a_finished_run_can_be_trained_on(products, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    first = Run(run).manifest()
    Run(run).write_manifest(first.model_copy(update={"versions": {"torch": "2.0"}, "command": ["uadx", "train"]}))
    metrics = train(small_config(), products, run, given={"trainer": {"max_epochs": 4}}, resume=True, interactive=False)
    assert (metrics["epochs"], metrics["samples_seen"]) == (4, 108)
    assert Run(run).manifest().earlier == [{"versions": {"torch": "2.0"}, "command": ["uadx", "train"]}]
    assert Run(run).manifest().versions == first.versions


def test_a_resumed_training_keeps_its_configuration(trained):
    run = Run(trained)
    given = {"optimizer": {"lr": 0.5}}
    with pytest.raises(UsageError, match=r"optimizer\.lr is 1\.0, not 0\.5"):
        resumed_config(run, given, small_config(given))
    more = resumed_config(run, {"trainer": {"max_epochs": 9}}, small_config({"optimizer": {"lr": 7.0}}))
    assert (more.trainer["max_epochs"], more.optimizer.lr) == (9, 1.0)


def test_what_the_first_call_asked_of_the_trainer_stays(products, tmp_path):
    """Also where the method has a wish of its own: it would clip nothing."""
    given = {"trainer": {"max_epochs": 1, "gradient_clip_val": 0.5}}
    small_run(products, tmp_path / "run", given, given=given)
    assert Run(tmp_path / "run").config().trainer["gradient_clip_val"] == 0.5
    more = {"trainer": {"max_epochs": 2}}
    small_run(products, tmp_path / "run", more, given=more, resume=True)
    assert Run(tmp_path / "run").config().trainer["gradient_clip_val"] == 0.5
    assert Run(tmp_path / "run").config().trainer["max_epochs"] == 2


def test_of_a_section_that_may_change_what_is_not_said_again_stays(trained, tmp_path, monkeypatch):
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    write_text(run.config_file, to_yaml(small_config({"thresholds": {"target_fpr": 0.05}})))
    given = {"thresholds": {"method": "normal-fpr"}, "plugins": ["acme_plugin"]}
    monkeypatch.setitem(sys.modules, "acme_plugin", ModuleType("acme_plugin"))
    more = resumed_config(run, given, small_config(given))
    assert (more.thresholds.method, more.thresholds.target_fpr, more.plugins) == ("normal-fpr", 0.05, ["acme_plugin"])


def test_a_folder_with_nothing_to_resume_is_said_so(products, tmp_path):
    lines = []
    metrics = small_run(products, tmp_path / "run", {"trainer": {"max_epochs": 1}}, resume=True, tell=lines.append)
    assert metrics["epochs"] == 1
    assert lines == [f"note: there is nothing to resume in {tmp_path / 'run'}: the training begins anew"]


def test_a_resumed_training_refuses_other_data(products, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    data = shutil.copytree(products, tmp_path / "data")
    Image.new("RGB", (64, 64)).save(data / "fabric" / "train" / "good" / "new.png")
    with pytest.raises(UadxError, match="the data is not what this training began with"):
        small_run(data, run, resume=True)


def test_a_moved_run_keeps_its_best_checkpoint(products, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "elsewhere")
    before, metrics = sha256_of(run / "model.ckpt"), read_json(run / "metrics.json")
    # A learning rate so high that no later epoch is better.
    given = {"trainer": {"max_epochs": 3}}
    config = Run(run).config()
    config.optimizer.lr, config.optimizer.schedule = 50.0, "constant"
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    state = torch.load(run / "last.ckpt", weights_only=False)
    for optimizer in state["optimizer_states"]:
        optimizer["param_groups"][0].update(lr=50.0, initial_lr=50.0)
    state["lr_schedulers"] = []
    torch.save(state, run / "last.ckpt")
    after = train(small_config(given), products, run, given=given, resume=True, interactive=False)
    assert after["best_val_loss"] == metrics["best_val_loss"]
    assert after["best_epoch"] == metrics["best_epoch"]
    assert sha256_of(run / "model.ckpt") == before
    assert torch.load(run / "last.ckpt", weights_only=False)["epoch"] == 2


def started(products, out):
    """Start a long training in a process of its own and wait for its first checkpoint."""
    command = [sys.executable, "-m", "uadx", "train", str(products), "--model", "stfpm", "--weights", "bundled"]
    command += ["--image-size", "64", "--epochs", "24", "--batch-size", "8", "--out", str(out)]
    command += ["--set", "trainer.accelerator=cpu", "--set", "optimizer.schedule=cosine"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A test that runs in the background of a shell has inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, command, environment


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_the_run_whole(products, tmp_path):
    process, _, _ = started(products, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: training was interrupted\nhint: continue it with --resume" in err.decode()
    assert not list((tmp_path / "run").glob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_sigkill_at_any_moment(products, tmp_path, delay):
    """A real process, killed for real; then the same command with --resume."""
    process, command, environment = started(products, tmp_path / "run")
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert Run(tmp_path / "run").manifest().status == "training"
    finished = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["epochs"] == 24
    assert metrics["samples_seen"] == 24 * 27
    expected = small_run(products, tmp_path / "unbroken", {"trainer": {"max_epochs": 24}, "optimizer": {"lr": 0.4}})
    assert metrics["best_val_loss"] == pytest.approx(expected["best_val_loss"], rel=0.05)
