"""Quantization-aware training: scales are trained, the teacher is not; a killed training goes on where it was."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import core, module, noise, quantized, students

from uad_plugins.artifacts import Run, sha256_of
from uad_plugins.config import model_plugin
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.imaging import read_rgb
from uad_plugins.quantization import nncf_qat
from uad_plugins.quantization.core import Preprocessing, build_core, recalibrate
from uad_plugins.quantization.nncf_qat import QatModule
from uad_plugins.quantization.options import QatOptions
from uad_plugins.quantization.quantize import Order, quantize
from uad_plugins.quantization.referee import AGAINST_FP32, TRAINED, Agreement
from uad_plugins.quantization.scope import TorchGraph
from uad_plugins.quantization.torch_quantization import hooks, load_quantized, student_scales
from uad_plugins.quantized import Quantized
from uad_plugins.training.checkpointing import AtomicCheckpointIO

FAST = {"accelerator": "cpu", "epochs": 3}


@pytest.fixture(scope="session")
def run(products, tmp_path_factory):
    from runs import small_run

    out = tmp_path_factory.mktemp("qat") / "run"
    small_run(products, out, {"model": {"layers": ["layer1"]}})
    return out


@pytest.fixture(scope="session")
def unbroken(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "q"
    return out, quantize(Order(run, out, "nncf-qat", samples=6, options=FAST))


def trainable(method, **options):
    """A module to train, and the names of its student's scales."""
    from copy import deepcopy

    model = deepcopy(quantized(method, "openvino"))
    scales = student_scales(model, TorchGraph.of(core(method), noise(1)[0]), students(method))
    preprocessing = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    chosen = QatOptions(**options)
    reference = core(method) if chosen.loss == "maps" else None
    return QatModule(model, students(method), scales, preprocessing, chosen, reference), scales


@pytest.mark.parametrize("method", ["stfpm", "reverse_distillation", "uninformed_students"])
@pytest.mark.parametrize("freeze", [True, False])
def test_a_step_moves_the_student_and_its_scales_and_nothing_else(method, freeze):
    model, scales = trainable(method, freeze_batchnorm=freeze, lr=1e-2, scale_lr=1e-2)
    # Each once: a shared scale has several names in the state dict.
    watched = {**dict(model.core.named_parameters()), **dict(model.core.named_buffers())}
    before = {name: value.detach().clone() for name, value in watched.items()}
    model.trainer = SimpleNamespace(estimated_stepping_batches=10, current_epoch=0)
    optimizer = model.configure_optimizers()["optimizer"]
    weights, of_scales = optimizer.param_groups
    assert len(of_scales["params"]) == len(scales)
    assert of_scales["weight_decay"] == 0.0
    assert len(weights["params"]) == len(students(method))
    model.losses(torch.cat(noise(2, seed=9)), training=True).mean().backward()
    optimizer.step()
    moved = {name for name in before if not torch.equal(before[name], watched[name])}
    assert moved & scales
    statistics = {name for name in moved if "running_" in name or "num_batches" in name}
    assert moved - statistics <= students(method) | scales
    assert bool(statistics) == (not freeze and method != "uninformed_students")
    assert not any("teacher" in name or "encoder" in name or "old" in name for name in moved - scales)


@pytest.mark.parametrize(("epochs", "moving"), [(1, [True]), (3, [True, True, False])])
def test_statistics_of_batchnorm_move_slowly_and_not_in_the_last_epoch(epochs, moving):
    model, _ = trainable("stfpm", freeze_batchnorm=False, epochs=epochs)
    layers = [(n, m) for n, m in model.core.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    mine = [layer for name, layer in layers if f"{name}.weight" in students("stfpm")]
    assert {layer.momentum for layer in mine} == {0.01}
    assert {layer.momentum for _, layer in layers if layer not in mine} == {0.1}
    found = []
    for epoch in range(epochs):
        model.trainer = SimpleNamespace(current_epoch=epoch)
        before = mine[0].running_mean.clone()
        model.losses(torch.cat(noise(2, seed=epoch)), training=True)
        found.append(not torch.equal(before, mine[0].running_mean))
    assert found == moving


@pytest.mark.parametrize("method", ["stfpm", "reverse_distillation", "uninformed_students"])
def test_scales_of_weights_and_of_activations_move_alike_by_default(method):
    """One rate in absolute terms leaves ranges of hundreds where they were."""
    model, scales = trainable(method, loss="distillation")
    model.trainer = SimpleNamespace(estimated_stepping_batches=20, current_epoch=0)
    optimizer = model.configure_optimizers()["optimizer"]
    named = dict(model.core.named_parameters())
    before = {name: named[name].detach().clone() for name in scales}

    def backward():
        optimizer.zero_grad()
        loss = model.losses(torch.cat(noise(2, seed=9)), training=True).mean()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(backward)) for _ in range(10)]
    assert losses[-1] < losses[0]
    moved = {name: float(((named[name] - value) / value).abs().mean()) for name, value in before.items()}
    kinds = [[share for name, share in moved.items() if (before[name].numel() > 1) == weights] for weights in (True, False)]
    medians = [float(torch.tensor(shares).median()) for shares in kinds]
    assert min(medians) > 2e-3
    assert max(medians) < 1.01 * 10 * QatOptions().scale_lr
    assert max(medians) < 3 * min(medians)


@pytest.mark.parametrize("method", ["stfpm", "reverse_distillation", "uninformed_students"])
def test_the_held_out_loss_is_the_training_loss(method):
    model, _ = trainable(method)
    images = torch.cat(noise(2, seed=9))
    step = model.training_step(SimpleNamespace(image=images))
    model.validation_step(SimpleNamespace(image=images))
    assert model.held_out_loss.shape == (2,)
    assert float(model.held_out_loss.detach().mean()) == pytest.approx(float(step.detach()), rel=1e-4)


def test_the_loss_is_that_of_the_method():
    """With the quantizers switched off it is the method's own, image by image."""
    model, _ = trainable("stfpm", loss="distillation")
    for quantizer in model.core.modules():
        if hasattr(quantizer, "disable_quantization"):
            quantizer.disable_quantization()
    images = torch.cat(noise(2, seed=9))
    expected, _ = type(module("stfpm")).distil(module("stfpm").model, images)
    # But for the biases, which calibration has corrected.
    assert torch.allclose(model.losses(images, training=False), expected, rtol=1e-3)


@pytest.mark.parametrize("method", ["stfpm", "reverse_distillation", "uninformed_students"])
def test_by_default_the_maps_of_fp32_are_learnt(method):
    model, scales = trainable(method, lr=1e-4, scale_lr=1e-2)
    model.trainer = SimpleNamespace(estimated_stepping_batches=20, current_epoch=0)
    images = torch.cat(noise(2, seed=9))
    with torch.no_grad():
        for name, value in model.core.named_parameters():
            # Ranges that clip, or there would be nothing to learn.
            value.mul_(0.3 if name in scales else 1)
    with torch.no_grad():
        expected, found = core(method)(images)[1], model.core(images)[1]
    share = (found - expected).square().sum(dim=(1, 2)) / expected.square().sum(dim=(1, 2))
    before = model.losses(images, training=False).detach()
    assert torch.allclose(before, share, rtol=1e-3)
    optimizer = model.configure_optimizers()["optimizer"]
    for _ in range(10):
        optimizer.zero_grad()
        model.losses(images, training=True).mean().backward()
        optimizer.step()
    assert model.losses(images, training=False).mean() < 0.8 * before.mean()


def test_the_network_that_is_to_be_met_is_neither_trained_nor_saved():
    model, _ = trainable("stfpm")
    before = {name: value.clone() for name, value in model._reference[0].state_dict().items()}
    assert not any("reference" in name for name in model.state_dict())
    model.losses(torch.cat(noise(2, seed=9)), training=True).mean().backward()
    assert all(value.grad is None for value in model._reference[0].parameters())
    assert all(torch.equal(value, before[name]) for name, value in model._reference[0].state_dict().items())


def test_the_best_epoch_is_kept_and_better_than_calibration(unbroken):
    out, manifest = unbroken
    facts = manifest.details
    assert facts["epochs"] == 3
    assert facts["samples_seen"] == 3 * 27
    assert facts["held_out_loss"] < facts["held_out_loss_calibrated"]
    assert facts["best_epoch"] in (1, 2, 3)
    assert set(manifest.files) == {"model.onnx", "model.xml", "model.bin", "quantized.ckpt"}
    assert not (out / "work").exists()
    assert not any(cases for rules in manifest.audit.values() for cases in rules.values())
    assert len(manifest.agreement) == 5


def test_the_trained_network_is_restored_bit_for_bit(run, tmp_path, monkeypatch):
    """What was trained, what lies in the checkpoint of the best epoch, and what is kept are the same network."""
    seen = {}
    whole = nncf_qat._fit

    def fit(request, module, data):
        seen["calibrated"] = {name: value.detach().clone() for name, value in module.core.named_parameters()}
        result = whole(request, module, data)
        seen["module"] = module
        return result

    monkeypatch.setattr(nncf_qat, "_fit", fit)
    manifest = quantize(
        Order(run, tmp_path / "q", "nncf-qat", samples=6, options={**FAST, "epochs": 2, "loss": "distillation"})
    )
    # The student of a single epoch has much to learn yet: its last epoch is the best, which is what we look at.
    assert manifest.details["best_epoch"] == 2
    trained, image = seen["module"].core.eval(), noise(1, seed=3)[0]
    moved = {n for n, v in trained.named_parameters() if not torch.equal(v, seen["calibrated"][n])}
    assert moved & seen["module"].scales
    opened = Run.open(run)
    fresh = build_core(model_plugin("stfpm").load(opened.checkpoint, opened.config()), (64, 64))
    kept = load_quantized(fresh, tmp_path / "q" / "quantized.ckpt")
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(trained(image), kept(image), strict=True))
    state, expected = kept.state_dict(), trained.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


class Killed(BaseException):
    """Stands for the process going away: nothing of ours catches it."""


@pytest.mark.parametrize("write", [1, 3, 4])
def test_killed_while_a_checkpoint_is_written(run, unbroken, tmp_path, monkeypatch, write):
    count = 0
    whole = AtomicCheckpointIO.save_checkpoint

    def cut(self, checkpoint, path, storage_options=None):
        nonlocal count
        count += 1
        if count == write:
            raise Killed
        whole(self, checkpoint, path, storage_options)

    order = Order(run, tmp_path / "q", "nncf-qat", samples=6, options=FAST)
    with monkeypatch.context() as patched:
        patched.setattr(AtomicCheckpointIO, "save_checkpoint", cut)
        with pytest.raises(Killed):
            quantize(order)
    with pytest.raises(UadxError, match="holds an unfinished one"):
        quantize(order)
    other = Order(run, tmp_path / "q", "nncf-qat", samples=6, options={**FAST, "lr": 0.5}, resume=True)
    with pytest.raises(UsageError, match="keeps its settings: options"):
        quantize(other)
    manifest = quantize(Order(run, tmp_path / "q", "nncf-qat", samples=6, options=FAST, resume=True))
    _, expected = unbroken
    assert manifest.details["samples_seen"] == expected.details["samples_seen"]
    assert manifest.details["held_out_loss"] == pytest.approx(expected.details["held_out_loss"], rel=1e-4)
    assert manifest.details["best_epoch"] == expected.details["best_epoch"]


def test_a_result_for_tensorrt_is_exported_by_its_backend(run, tmp_path, monkeypatch):
    options = {**FAST, "epochs": 1, "profile": "tensorrt"}
    trained = quantize(Order(run, tmp_path / "qat", "nncf-qat", samples=6, options=options))
    assert trained.profile == "tensorrt"
    assert trained.details["overflow_fix"] == "disable"
    chosen = {"source": str(tmp_path / "qat"), "weights": "int8"}
    limits = []
    with monkeypatch.context() as patched:
        patched.setattr(Agreement, "wrong", lambda self, given: limits.append(given) or [])
        manifest = quantize(Order(run, tmp_path / "trt", "tensorrt-int8", samples=8, options=chosen))
    assert TRAINED in limits
    assert AGAINST_FP32["int8"] not in limits
    assert manifest.profile == "tensorrt"
    # Of the training, not of this call.
    assert manifest.calibration == trained.calibration
    assert manifest.calibration["samples"] == 6
    assert manifest.details["source_sha256"] == sha256_of(tmp_path / "qat" / "quantized.ckpt")
    assert manifest.details["source_details"] == trained.details
    assert manifest.agreement["onnxruntime model.onnx"]["map_l2"] == pytest.approx(
        trained.agreement["onnxruntime model.onnx"]["map_l2"], rel=1e-3
    )
    with pytest.raises(UsageError, match="with profile tensorrt"):
        quantize(Order(run, tmp_path / "x", "tensorrt-int8", options={"source": str(tmp_path / "trt")}))
    with (tmp_path / "qat" / "quantized.ckpt").open("r+b") as file:
        file.write(b"0000")
    with pytest.raises(UadxError, match="is not the file that was written"):
        quantize(Order(run, tmp_path / "y", "tensorrt-int8", options=chosen))


def test_calibration_that_no_epoch_improved_on_is_judged_as_such(run, tmp_path, monkeypatch):
    """A rate at which training only does damage."""
    limits = []
    monkeypatch.setattr(Agreement, "wrong", lambda self, given: limits.append(given) or [])
    options = {**FAST, "epochs": 1, "lr": 10.0}
    manifest = quantize(Order(run, tmp_path / "q", "nncf-qat", samples=6, options=options))
    assert manifest.details["best_epoch"] == 0
    assert AGAINST_FP32["int8"] in limits
    assert TRAINED not in limits


def test_scope_student_is_trained_and_exported(run, tmp_path):
    options = {**FAST, "epochs": 1, "scope": "student"}
    manifest = quantize(Order(run, tmp_path / "q", "nncf-qat", samples=6, options=options))
    assert not manifest.whole
    # The teacher's weights stay float: half of the network.
    assert 0.5 < manifest.size["onnx"]["ratio"] < 0.75


def test_images_vary_as_they_did_in_the_training_of_the_run(products, tmp_path, monkeypatch):
    from runs import small_run

    over = {"model": {"layers": ["layer1"]}, "trainer": {"max_epochs": 1}, "augmentation": {"contrast": 0.2, "share": 1.0}}
    small_run(products, tmp_path / "run", over)
    changes, step = [], QatModule.training_step

    def training_step(module, batch, *args):
        stored = [torch.tensor(np.asarray(read_rgb(path))).permute(2, 0, 1) / 255 for path in batch.image_path]
        changes.append((batch.image / torch.stack(stored)).nanmedian(dim=1).values.nanmean(dim=(1, 2)))
        return step(module, batch, *args)

    monkeypatch.setattr(QatModule, "training_step", training_step)
    quantize(Order(tmp_path / "run", tmp_path / "q", "nncf-qat", samples=6, options={**FAST, "epochs": 1}))
    factors = torch.cat(changes)
    assert 0.75 < factors.min() < 0.95
    assert 1.05 < factors.max() < 1.25


def test_a_method_without_a_student_is_refused(products, tmp_path):
    from runs import small_run

    model = {"name": "anomalib:Padim", "layers": ["layer1"], "options": {"n_features": 16}}
    small_run(products, tmp_path / "run", {"model": model, "trainer": {"max_epochs": 1}})
    with pytest.raises(UsageError, match="cannot be quantized by nncf-qat"):
        quantize(Order(tmp_path / "run", tmp_path / "q", "nncf-qat"))


@pytest.mark.slow
def test_sigkill_at_any_moment(run, tmp_path):
    """A real process, killed for real; then the same command with --resume."""
    out = tmp_path / "q"
    command = [sys.executable, "-m", "uadx", "quantize", str(run), "--backend", "nncf-qat", "--samples", "6"]
    command += ["--epochs", "40", "--set", "accelerator=cpu", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 180
    while not (out / "work" / "last.ckpt").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert Quantized(out).manifest().status == "quantizing"
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Quantized.open(out).manifest().details["samples_seen"] == 40 * 27


@pytest.mark.parametrize("profile", ["openvino", "tensorrt"])
def test_statistics_of_scores_are_those_of_the_quantized_network(profile):
    """Uninformed Students measures error and variance against their distribution, which quantizers shift."""
    from copy import deepcopy

    model = deepcopy(quantized("uninformed_students", profile))
    network = model.network
    network.score_mean += 3 * network.score_std
    seen, images = [], noise(3, seed=9)
    hook = next(iter(hooks(model)))[1]
    handle = hook.register_forward_hook(lambda *_: seen.append(1))
    recalibrate(module("uninformed_students"), model, images)
    handle.remove()
    assert len(seen) >= len(images)
    with torch.no_grad():
        maps = torch.cat([model(image)[1] for image in images])
    # A mean of z-scores, over the pixels that they were taken from.
    assert float(maps.mean()) == pytest.approx(0.0, abs=0.05)
    expected = module("uninformed_students").model
    assert not torch.equal(network.score_mean, expected.score_mean)
    assert torch.allclose(network.feature_mean, expected.feature_mean)


def test_methods_without_statistics_have_nothing_to_measure_anew():
    from copy import deepcopy

    model = deepcopy(quantized("stfpm", "openvino"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(module("stfpm"), model, noise(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
