"""Training to a run on disk: what it holds, what it refuses, and that the same seed gives the same scores."""

import csv
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from anomalib.models import Fastflow
from lightning.pytorch import Trainer
from runs import small_config, small_datamodule, small_run

from uad_plugins.artifacts import Run, read_json, sha256_of
from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import hold_out
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models.stfpm import Stfpm
from uad_plugins.training.run_folder import check_folder, locked
from uad_plugins.training.signals import child_signal_restored


def test_the_run_holds_all_that_later_verbs_need(trained):
    names = {path.name for path in trained.iterdir()}
    expected = {
        "run.json",
        "config.yaml",
        "model.ckpt",
        "last.ckpt",
        "thresholds.json",
        "metrics.json",
        "skipped.json",
        "split.json",
        "logs",
    }
    # Another test may have evaluated it.
    assert names - {"evaluation.json"} == expected
    manifest = Run.open(trained).manifest()
    assert (manifest.status, manifest.model, manifest.image_size) == ("finished", "stfpm", (64, 64))
    assert manifest.categories == ["connector", "fabric", "washer"]
    assert manifest.data["counts"]["fabric"] == {"train": 9, "val": 1, "test": 8}
    assert manifest.weights["source"] == "bundled"
    assert len(manifest.weights["sha256"]) == 64
    assert manifest.checkpoint_sha256 == sha256_of(trained / "model.ckpt")
    assert {"torch", "anomalib", "lightning", "timm", "numpy", "pillow", "python"} <= set(manifest.versions)


def test_the_resolved_configuration_trains_the_same(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (config["optimizer"]["lr"], config["data"]["image_size"], config["trainer"]["max_epochs"]) == (1.0, 64, 2)
    stored, asked = Run(trained).config(), small_config()
    # The method's own wishes for the trainer are written down too.
    assert stored.trainer == {**asked.trainer, "gradient_clip_val": 0, "num_sanity_val_steps": 0}
    assert stored.model_copy(update={"trainer": {}}) == asked.model_copy(update={"trainer": {}})


def test_both_logs_are_written(trained):
    (table,) = (trained / "logs" / "csv").rglob("metrics.csv")
    heading = table.read_text().splitlines()[0].split(",")
    assert {"epoch", "step", "val_loss", "train_loss_epoch"} <= set(heading)
    assert list((trained / "logs" / "tensorboard").rglob("events.out.tfevents.*"))


def test_metrics_say_what_was_done(trained):
    metrics = read_json(trained / "metrics.json")
    assert (metrics["epochs"], metrics["samples_seen"], metrics["processes"]) == (2, 54, 1)
    assert metrics["device"].startswith(("cpu", "cuda: ", "mps"))
    assert metrics["best_epoch"] in {1, 2}
    assert set(metrics["val_loss_per_category"]) == {"connector", "fabric", "washer"}
    assert np.mean(list(metrics["val_loss_per_category"].values())) >= metrics["best_val_loss"] - 1e-6


def test_the_checkpoint_kept_is_the_best_by_held_out_images(products, tmp_path):
    # Steps so large that the second epoch is worse than the first.
    over = {"optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0.0}, "trainer": {"max_epochs": 3}}
    metrics = small_run(products, tmp_path / "run", over)
    (table,) = (tmp_path / "run" / "logs" / "csv").rglob("metrics.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    column = rows[0].index("val_loss")
    losses = [float(row[column]) for row in rows[1:] if row[column]]
    assert len(losses) == 3
    assert metrics["best_val_loss"] == pytest.approx(min(losses), rel=1e-4)
    assert metrics["best_epoch"] == int(np.argmin(losses)) + 1


def test_same_seed_same_scores(products, trained, tmp_path):
    small_run(products, tmp_path / "again")
    small_run(products, tmp_path / "other", {"seed": 1})
    paths = [sample.path for sample in scan(products) if sample.split == "test"][:6]
    scores = {}
    for name, folder in (("first", trained), ("again", tmp_path / "again"), ("other", tmp_path / "other")):
        with open_detector(folder) as detector:
            scores[name] = [prediction.score for prediction in detector.stream(paths)]
    assert scores["first"] == scores["again"]
    assert scores["first"] != scores["other"]


def test_thresholds_come_from_held_out_normal_images_alone(products, trained):
    stored = read_json(trained / "thresholds.json")
    assert stored["source"] == "3 normal images held out from training"
    assert (stored["method"], stored["target_fpr"]) == ("normal-fpr", 0.01)
    held_out = hold_out(scan(products), 0.1, 0)
    with open_detector(trained) as detector:
        for category in held_out.categories:
            (index,) = held_out.where(split="val", category=category)
            (prediction,) = detector.stream([held_out.paths[int(index)]])
            assert stored["categories"][category]["value"] >= prediction.score * (1 - 1e-6)
            assert stored["categories"][category]["normal"] == 1


def test_best_f1_is_taken_where_labelled_validation_images_are_given(products, tmp_path):
    rows = []
    for number, sample in enumerate(scan(products)):
        split = "val" if sample.split == "test" and number % 2 else sample.split
        rows.append({"path": sample.path, "category": sample.category, "split": split, "label": sample.label})
    # Each category keeps good validation images, so that nothing is held out from training.
    (tmp_path / "index.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    small_run(tmp_path, tmp_path / "run", {"thresholds": {"method": "best-f1"}, "trainer": {"max_epochs": 1}})
    stored = read_json(tmp_path / "run" / "thresholds.json")
    assert (stored["method"], stored["target_fpr"]) == ("best-f1", None)
    assert stored["source"] == "12 labelled images held out from training"
    assert stored["pooled"]["anomalous"] == 6


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"trainer": {"max_epoch": 2}}, "unknown configuration key 'trainer.max_epoch'"),
        ({"trainer": {"max_epochs": 0}}, "must be a whole number of at least 1"),
        ({"trainer": {"fast_dev_run": True}}, "trainer.fast_dev_run leaves no checkpoint behind"),
        ({"trainer": {"barebones": True}}, "trainer.barebones leaves no checkpoint behind"),
        ({"trainer": {"limit_train_batches": 0}}, "trainer.limit_train_batches: 0 leaves nothing to train on"),
        ({"trainer": {"limit_train_batches": 0.0}}, "trainer.limit_train_batches: 0.0 leaves nothing to train on"),
        ({"trainer": {"max_steps": 0}}, "trainer.max_steps: 0 leaves no step to train"),
        ({"trainer": {"limit_val_batches": 0}}, "trainer.limit_val_batches: 0 leaves nothing to choose the checkpoint by"),
        ({"trainer": {"val_check_interval": 0.5}}, "trainer.val_check_interval: a checkpoint of half an epoch"),
        ({"trainer": {"callbacks": []}}, "trainer.callbacks is set by uadx itself"),
        ({"trainer": {"strategy": "ddp_spawn"}}, "ddp_spawn trains in copies of this process"),
        ({"trainer": {"strategy": "ddp_fork_find_unused_parameters_true"}}, "trains in copies of this process"),
        ({"trainer": {"strategy": "ddp_notebook"}}, "ddp_notebook trains in copies of this process"),
        ({"trainer": {"precision": "half"}}, "trainer.precision: 'half' cannot be used here: "),
        ({"trainer": {"strategy": "dpp"}}, "trainer.strategy: 'dpp' cannot be used here: "),
        ({"trainer": {"limit_train_batches": "few"}}, "trainer.limit_train_batches: 'few' cannot be used here: "),
        ({"trainer": {"accelerator": "cpu", "devices": "2x"}}, "trainer.devices: '2x' cannot be used here: "),
        ({"model": {"weights": "nowhere.pth"}}, "no such file or folder of backbone weights"),
        ({"model": {"weights": "checkpoint"}}, "model.weights: 'checkpoint' stands for those of a training that goes on"),
        ({"model": {"backbone": "resnet19"}}, "unknown backbone 'resnet19'"),
        ({"data": {"categories": ["fabrik"]}}, "unknown category 'fabrik'"),
        ({"data": {"layout": "mvtek"}}, "unknown layout 'mvtek'"),
    ],
)
def test_wrong_requests_leave_nothing_behind(products, tmp_path, over, message):
    with pytest.raises(UadxError, match=message):
        small_run(products, tmp_path / "run", over)
    assert not any((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


@pytest.fixture
def damaged(products, tmp_path):
    data = shutil.copytree(products, tmp_path / "data")
    victim = sorted((data / "fabric" / "train" / "good").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:200])
    return data, victim


def test_an_unreadable_image_stops_training_before_it_starts(damaged, tmp_path):
    data, victim = damaged
    with pytest.raises(UadxError) as error:
        small_run(data, tmp_path / "run")
    assert error.value.message.startswith(f"{victim}: cannot be decoded")
    assert "--skip-bad" in error.value.hint
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_loss_that_is_no_number_stops_training(products, tmp_path):
    with pytest.raises(UadxError, match="the loss became nan|the loss became inf") as error:
        small_run(products, tmp_path / "run", {"optimizer": {"name": "adam", "lr": 1e30, "schedule": "constant"}})
    assert error.value.hint.startswith("lower optimizer.lr; the checkpoints")


def test_a_method_with_an_optimizer_of_its_own_is_not_told_to_change_another(products, tmp_path, monkeypatch):
    def step(self, batch, *_):
        return {"loss": self.model(batch.image)[0][0].sum() * float("nan")}

    monkeypatch.setattr(Fastflow, "training_step", step)
    with pytest.raises(UadxError, match="the loss became nan") as error:
        small_run(products, tmp_path / "run", {"model": {"name": "anomalib:Fastflow"}})
    assert error.value.hint.startswith(
        "the method brings its own optimizer: lower its learning rate in model.options, if it takes one; the checkpoints"
    )


def test_a_finished_run_is_not_overwritten_unasked(products, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = sha256_of(run / "model.ckpt")
    with pytest.raises(UadxError, match="holds a finished run"):
        small_run(products, run)
    assert sha256_of(run / "model.ckpt") == before
    small_run(products, run, {"seed": 5, "trainer": {"max_epochs": 1}}, overwrite=True)
    assert sha256_of(run / "model.ckpt") != before


def test_a_foreign_folder_is_not_touched(products, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UadxError, match="is not empty and holds no run"):
            check_folder(Run(tmp_path / "precious"), **{"resume": False, "overwrite": False, **options})
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="contradict"):
        check_folder(Run(tmp_path / "new"), resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("data", "over", "message"),
    [
        ("nowhere", {}, "no such file or folder"),
        (None, {"model": {"weights": "nowhere.pth"}}, "no such file or folder of backbone weights"),
        (None, {"data": {"categories": ["fabrik"]}}, "unknown category"),
        (None, {"trainer": {"accelerator": "abacus"}}, "trainer.accelerator: 'abacus' cannot be used here"),
    ],
)
def test_a_run_is_replaced_only_when_its_successor_can_begin(products, trained, tmp_path, data, over, message):
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    with pytest.raises(UadxError, match=message):
        small_run(products if data is None else tmp_path / data, run, over, overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_finished_run_is_not_reopened_by_what_cannot_be_trained_with(products, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    over = {"trainer": {"max_epochs": 3, "accelerator": "abacus"}}
    with pytest.raises(UsageError, match="trainer.accelerator: 'abacus' cannot be used here"):
        small_run(products, run, over, resume=True, given=over)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_images_of_another_shape_are_named_before_training(mvtec, picture, tmp_path):
    data = mvtec(tmp_path / "data", "bolt", train=4)
    for name in ("nut/good/1.png", "nut/good/2.png", "loose.png"):
        picture(data / name)
    said = []
    small_run(data, tmp_path / "run", {"trainer": {"max_epochs": 1}}, tell=said.append)
    note = "note: images that belong to no category are left out: . (1), nut (2); docs/data.md shows the layouts"
    assert said == [note]
    chosen = {"trainer": {"max_epochs": 1}, "data": {"categories": ["bolt"]}}
    small_run(data, tmp_path / "chosen", chosen, tell=said.append)
    assert said == [note]


def test_two_trainings_cannot_write_to_one_run(products, tmp_path):
    run = Run(tmp_path / "run")
    with locked(run.folder), pytest.raises(UadxError, match="another process is writing to it"):
        small_run(products, run.folder)
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_wins_over_what_the_method_suggests(products, tmp_path):
    given = {"trainer": {"gradient_clip_val": 0.5, "max_epochs": 1}}
    small_run(products, tmp_path / "run", given, given=given)
    assert Run(tmp_path / "run").config().trainer["gradient_clip_val"] == 0.5
    small_run(products, tmp_path / "other", {"trainer": {"max_epochs": 1}})
    assert Run(tmp_path / "other").config().trainer["gradient_clip_val"] == 0


def test_what_a_memory_bank_needs_cannot_be_overruled(products, tmp_path):
    over = {"model": {"name": "anomalib:Padim"}, "trainer": {"max_epochs": 3}}
    with pytest.raises(UsageError, match="anomalib:Padim needs trainer.max_epochs to be 1, not 3"):
        small_run(products, tmp_path / "run", over, given=over)
    small_run(products, tmp_path / "run", over)
    assert Run(tmp_path / "run").config().trainer["max_epochs"] == 1


def test_reverse_distillation_names_the_sizes_it_takes(products, tmp_path):
    over = {"model": {"name": "reverse_distillation"}, "data": {"image_size": 100}}
    with pytest.raises(UsageError, match="multiples of 32, not 100x100") as error:
        small_run(products, tmp_path / "run", over)
    assert error.value.hint == "use 96"


def test_best_f1_without_labels_is_refused_before_training(products, tmp_path):
    with pytest.raises(UadxError, match="best-f1 needs defective images in the validation split"):
        small_run(products, tmp_path / "run", {"thresholds": {"method": "best-f1"}})


def test_methods_without_a_backbone_refuse_weights(products, tmp_path):
    over = {"model": {"name": "anomalib:Ganomaly", "backbone": None, "weights": "bundled"}}
    with pytest.raises(UadxError, match="Ganomaly has no backbone that could be given weights"):
        small_run(products, tmp_path / "run", over)


def test_a_loss_before_training_is_not_the_best(products, tmp_path):
    """Lightning's sanity check validates a network that has learnt nothing."""
    over = {"trainer": {"num_sanity_val_steps": 2, "max_epochs": 1}}
    metrics = small_run(products, tmp_path / "run", over, given=over)
    with (next((tmp_path / "run" / "logs" / "csv").rglob("metrics.csv"))).open() as file:
        logged = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    assert metrics["best_val_loss"] == pytest.approx(logged[-1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning")
def test_a_model_that_was_built_for_a_checkpoint_is_not_trained_without_one(products, trained, tmp_path):
    data = small_datamodule(products)
    arguments = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": tmp_path,
        "enable_checkpointing": False,
    }
    arguments |= {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_train_batches": 1,
        "log_every_n_steps": 1,
    }
    with pytest.raises(UadxError, match="weights='checkpoint' brings no backbone weights of its own"):
        Trainer(**arguments).fit(Stfpm(weights="checkpoint"), datamodule=data)
    # Of one that was loaded, they have come with it.
    Trainer(**arguments).fit(Stfpm.load_from_checkpoint(trained / "model.ckpt", map_location="cpu"), datamodule=data)


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    content = (run / "model.ckpt").read_bytes()
    (run / "model.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UadxError, match="is not the checkpoint that was trained"):
        open_detector(run)
    manifest = Run(run).manifest()
    Run(run).write_manifest(manifest.model_copy(update={"checkpoint_sha256": None}))
    with pytest.raises(UadxError, match="model.ckpt: cannot be read"):
        open_detector(run)


def test_a_run_of_a_newer_schema_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "schema": "uadx.run/99"}))
    with pytest.raises(UadxError, match="schema 'uadx.run/99' is not known"):
        open_detector(run)


def test_the_checkpoint_is_safe_to_load(trained):
    from anomalib.utils.serialization import anomalib_safe_globals

    with anomalib_safe_globals():
        state = torch.load(trained / "model.ckpt", map_location="cpu", weights_only=True)
    assert state["hyper_parameters"]["backbone"] == "resnet18"


def test_no_signal_handler_is_left_behind():
    """As torch's data loader leaves one, at the first worker of a process."""
    before = signal.getsignal(signal.SIGCHLD)
    with child_signal_restored():
        signal.signal(signal.SIGCHLD, lambda *_: None)
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.skipif(sys.platform != "linux", reason="stacks of Linux")
def test_the_end_of_a_worker_is_no_fault_with_a_signal_stack_that_is_gone():
    """As OpenVINO may leave one: in a process of its own, which would die."""
    script = """
import ctypes, mmap, signal, subprocess
from uad_plugins.training.signals import SignalStack, child_signal_restored
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
address = libc.mmap(None, 1 << 16, 3, 0x22, -1, 0)
assert libc.sigaltstack(ctypes.byref(SignalStack(address, 0, 1 << 16)), None) == 0
libc.munmap(address, 1 << 16)
ended = []
with child_signal_restored():
    signal.signal(signal.SIGCHLD, lambda *_: ended.append(1))
    subprocess.run(["true"], check=True)
assert ended
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
