"""What keeps the decoder of Reverse Distillation from restoring bad places."""

import copy

import pytest
import torch
from runs import small_run
from students import SIZE, build, good_batch, in_training
from torch.nn import functional as F

from uad_plugins.errors import UsageError
from uad_plugins.models import ReverseDistillation
from uad_plugins.models.descriptors import EASY, anomaly_loss
from uad_plugins.models.reverse_distillation import AnyLayoutLoss


def images(count=4):
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def step(model, batch_idx=0):
    return model.training_step(good_batch(images()), batch_idx)["loss"]


@pytest.mark.parametrize("anomalies", [0.0, 0.5])
def test_the_decoder_does_without_some_of_the_bottleneck(anomalies, monkeypatch):
    model = in_training(ReverseDistillation, monkeypatch, bottleneck_dropout=0.25, synthetic_anomalies=anomalies)
    whole, handed_on = [], []
    model.model.bottleneck.register_forward_hook(lambda _module, _inputs, output: whole.append(output))
    model.model.decoder.register_forward_pre_hook(lambda _module, inputs: handed_on.append(inputs[0]))
    step(model).backward()
    (before,), (after,) = whole, handed_on
    kept = after != 0
    assert kept[before != 0].float().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.allclose(after[kept], before[kept] / 0.75)
    assert any(parameter.grad is not None for parameter in model.model.bottleneck.parameters())


def test_what_it_does_without_is_drawn_for_each_batch(monkeypatch):
    model = in_training(ReverseDistillation, monkeypatch, bottleneck_dropout=0.5)
    torch.manual_seed(3)
    first = step(model)
    torch.rand(5)
    assert torch.equal(step(model), first)
    assert not torch.equal(step(model, batch_idx=1), first)


def test_only_training_steps_have_a_noisy_bottleneck(monkeypatch):
    model = in_training(ReverseDistillation, monkeypatch, bottleneck_dropout=0.5)
    usual = in_training(ReverseDistillation, monkeypatch)
    usual.load_state_dict(model.state_dict())
    monkeypatch.setattr(model.model.decoder, "forward", lambda _features: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model)
    monkeypatch.undo()
    before, after = (each.model(images()) for each in (usual, model))
    assert all(torch.equal(*pair) for pair in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_methods_and_only_gradients_differ(layout, precision):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 8, 8, 8, generator=generator).to(precision, memory_format=layout)
    after = (before + 0.5 * torch.randn(before.shape, generator=generator)).to(precision, memory_format=layout)
    after.requires_grad_()
    usual, mined = (loss([before], [after]) for loss in (AnyLayoutLoss(), AnyLayoutLoss(0.75)))
    assert torch.allclose(usual, mined)
    (wanted,), (found,) = (torch.autograd.grad(loss, after) for loss in (usual, mined))
    # The places of both images together, those restored worst: a quarter.
    apart = 1 - F.cosine_similarity(before.float(), after.float())
    hard = apart >= apart.flatten().sort().values[-apart.numel() // 4]
    factor = torch.where(hard, 1.0, EASY)[:, None]
    assert torch.allclose(found.float(), wanted.float() * factor, rtol=2e-2 if precision == torch.bfloat16 else 1e-5)


def test_what_flows_back_from_a_finer_layer_is_not_mined():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 8, 4, 4, generator=generator).requires_grad_()
    before = [torch.randn(1, 8, 4, 4, generator=generator) for _ in range(2)]
    fine = coarse.detach() * 2
    usual, mined = (loss(before, [fine.clone(), coarse]) for loss in (AnyLayoutLoss(), AnyLayoutLoss(0.75)))
    own = [torch.autograd.grad(loss, coarse)[0] for loss in (usual, mined)]
    both = [torch.autograd.grad(AnyLayoutLoss(each)(before, [coarse * 2, coarse]), coarse)[0] for each in (0.0, 0.75)]
    alone = [torch.autograd.grad(AnyLayoutLoss(each)(before[:1], [coarse * 2]), coarse)[0] for each in (0.0, 0.75)]
    for mine, finer, together in zip(own, alone, both, strict=True):
        assert torch.allclose(mine + finer, together, atol=1e-6)


@pytest.mark.parametrize("anomalies", [0.0, 0.5])
def test_hard_mining_is_that_of_the_training_step(anomalies, monkeypatch):
    options = {"synthetic_anomalies": anomalies}
    mined, usual = (
        in_training(ReverseDistillation, monkeypatch, hard_mining=0.9, **options),
        in_training(ReverseDistillation, monkeypatch, **options),
    )
    usual.load_state_dict(mined.state_dict())
    losses = [step(each) for each in (mined, usual)]
    assert torch.allclose(*losses)
    for loss in losses:
        loss.backward()
    one, other = (next(iter(each.model.decoder.parameters())).grad for each in (mined, usual))
    assert not torch.allclose(one, other)


def test_the_decoder_is_kept_from_restoring_anomalies(monkeypatch):
    model = in_training(ReverseDistillation, monkeypatch, synthetic_anomalies=0.5, anomaly_weight=2.0, hard_mining=0.75)
    loss = step(model)
    drawn, opacity = model.with_anomalies(images())
    before, after = (dict(zip("abc", each, strict=True)) for each in model.model(drawn))
    assert torch.allclose(loss, anomaly_loss(before, after, opacity, 2.0, 0.75).mean())
    assert 0 < (opacity.amax(dim=(1, 2, 3)) > 0).sum() < 4


@pytest.mark.parametrize("weight", [None, 2.0])
def test_held_out_parts_are_judged_as_they_are_learnt(weight, monkeypatch):
    model = in_training(ReverseDistillation, monkeypatch, synthetic_anomalies=0.5, anomaly_weight=weight)
    with torch.no_grad():
        (before, after), shown = model.model(images()), copy.deepcopy(model.model)
        found, _ = ReverseDistillation.distil(shown, images())
    places = anomaly_loss(*(dict(enumerate(each)) for each in (before, after)), torch.zeros(4, 1, *SIZE), 2.0)
    assert torch.allclose(found.mean(), model.loss(before, after) if weight is None else places.mean())
    assert not torch.allclose(model.loss(before, after), places.mean(), rtol=1e-2)


def test_a_weight_of_anomalies_and_none():
    with pytest.raises(UsageError, match="anomaly_weight"):
        build(ReverseDistillation, anomaly_weight=2.0)


def test_all_are_options_of_a_run(products, tmp_path):
    options = {"bottleneck_dropout": 0.25, "hard_mining": 0.9, "synthetic_anomalies": 0.5, "anomaly_weight": 2.0}
    options = {**options, "conditional_norm": True}
    trainer = {"max_epochs": 1, "precision": "bf16-mixed"}
    over = {"model": {"name": "reverse_distillation", "options": options}, "trainer": trainer}
    small_run(products, tmp_path / "run", over)
    loaded = ReverseDistillation.load_from_checkpoint(tmp_path / "run" / "model.ckpt", map_location="cpu")
    assert loaded.bottleneck_dropout == 0.25
    assert loaded.anomaly_weight == 2
    assert loaded.hard_mining == loaded.loss.mining == 0.9


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, value) for option in ("bottleneck_dropout", "hard_mining") for value in (-0.1, 1.0, True, "0.5")),
        *(("anomaly_weight", value) for value in (0, float("inf"), True)),
    ],
)
def test_values_that_make_no_sense(option, value, products, tmp_path):
    over = {"model": {"name": "reverse_distillation", "options": {"synthetic_anomalies": 0.5, option: value}}}
    with pytest.raises(UsageError, match=option):
        small_run(products, tmp_path / "run", over)
    assert not (tmp_path / "run").exists()
