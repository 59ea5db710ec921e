"""The two distillation models: what is ours, and that anomalib takes them as its own."""

import math

import pytest
import torch
from anomalib.models import ReverseDistillation as AnomalibReverseDistillation
from anomalib.models import Stfpm as AnomalibStfpm
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from anomalib.models.image.stfpm.loss import STFPMLoss
from students import SIZE, build, features, in_training, randomised
from torch.nn import functional as F

from uad_plugins.config import OptimizerConfig
from uad_plugins.data.batches import UnifiedBatch
from uad_plugins.errors import UsageError
from uad_plugins.models import ReverseDistillation, Stfpm
from uad_plugins.models.backbones import CHECKPOINT, alias, backbone_weights
from uad_plugins.models.recipe import learning_rate_factor
from uad_plugins.models.reverse_distillation import AnyLayoutLoss
from uad_plugins.models.stfpm import MeanSTFPMLoss


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_loss_is_the_authors_mean_and_anomalibs_times_two_over_the_batch(batch):
    teacher, student = features(batch), features(batch, 1)
    found = MeanSTFPMLoss()(teacher, student)
    # gdwang08/STFPM: sum over channels, mean over images and pixels, sum over layers.
    authors = sum(((F.normalize(teacher[k]) - F.normalize(student[k])) ** 2).sum(1).mean() for k in teacher)
    assert torch.allclose(found, authors)
    assert torch.allclose(found, STFPMLoss()(teacher, student) * 2 / batch)


def test_a_step_does_not_grow_with_the_batch():
    once = [F.normalize(f) for f in features(1).values()]
    teacher = {k: v for k, v in zip(features(1), once, strict=True)}
    student = {k: v.clone().requires_grad_() for k, v in features(1, 1).items()}
    MeanSTFPMLoss()(teacher, student).backward()
    gradient = student["layer1"].grad.clone()
    repeated = {k: v.detach().repeat(4, 1, 1, 1).requires_grad_() for k, v in student.items()}
    MeanSTFPMLoss()({k: v.repeat(4, 1, 1, 1) for k, v in teacher.items()}, repeated).backward()
    assert torch.allclose(repeated["layer1"].grad.sum(0, keepdim=True), gradient, atol=1e-7)


def test_the_reverse_distillation_loss_takes_either_memory_layout():
    encoded, decoded = list(features(2).values()), list(features(2, 1).values())
    last = [f.contiguous(memory_format=torch.channels_last) for f in encoded]
    assert torch.allclose(AnyLayoutLoss()(last, decoded), ReverseDistillationLoss.forward(encoded, decoded))


@pytest.mark.parametrize("cls", [Stfpm, ReverseDistillation])
def test_the_held_out_loss_of_an_image_is_its_training_loss(cls):
    model = randomised(build(cls)).eval()
    batch = UnifiedBatch(image=torch.rand(3, 3, *SIZE), gt_label=torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        predicted = model.validation_step(batch)
        each = []
        for image in batch.image:
            if cls is Stfpm:
                teacher, student = model.model.teacher_model(image[None]), model.model.student_model(image[None])
                each.append(model.loss(teacher, student))
            else:
                encoded = list(model.model.encoder(image[None]).values())
                each.append(model.loss(encoded, model.model.decoder(model.model.bottleneck(encoded))))
        reference = model.model(torch.as_tensor(batch.image))
    assert torch.allclose(model.held_out_loss, torch.stack(each), rtol=1e-4)
    assert torch.allclose(predicted.pred_score.flatten(), reference.pred_score.flatten(), rtol=1e-5)
    assert torch.allclose(predicted.anomaly_map.squeeze(), reference.anomaly_map.squeeze(), rtol=1e-5)


@pytest.mark.parametrize("cls", [Stfpm, ReverseDistillation])
def test_only_the_student_is_trained(cls):
    model = build(cls)
    trained = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    names = {name.split(".")[1] for name, p in model.named_parameters() if id(p) in trained}
    assert names == ({"student_model"} if cls is Stfpm else {"decoder", "bottleneck"})
    frozen = model.model.teacher_model if cls is Stfpm else model.model.encoder
    assert not {id(p) for p in frozen.parameters()} & trained


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"name": "sgd", "lr": 0.1, "momentum": 0.8}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8}),
        ({"name": "adam", "lr": 0.01, "betas": (0.5, 0.99)}, torch.optim.Adam, {"lr": 0.01, "betas": (0.5, 0.99)}),
        ({"name": "adamw", "lr": 0.01, "weight_decay": 0.3}, torch.optim.AdamW, {"weight_decay": 0.3}),
    ],
)
def test_the_optimizer_is_the_configured_one(options, kind, expected):
    optimizer = build(Stfpm, optimizer=options).configure_optimizers()
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in expected} == expected


def test_the_learning_rate_follows_the_schedule():
    cosine = OptimizerConfig(schedule="cosine")
    assert [round(learning_rate_factor(cosine, p), 3) for p in (0, 0.5, 1)] == [1.0, 0.5, 0.0]
    warm = OptimizerConfig(schedule="constant", warmup=0.1)
    assert learning_rate_factor(warm, 0.05) == pytest.approx(0.51)
    assert learning_rate_factor(warm, 0.5) == 1.0


def checkpoint_of(model, path):
    from lightning.pytorch import Trainer

    trainer = Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec")
@pytest.mark.parametrize("cls", [Stfpm, ReverseDistillation])
def test_a_checkpoint_brings_everything_and_fetches_nothing(cls, tmp_path, monkeypatch):
    model = randomised(build(cls)).eval()
    path = checkpoint_of(model, tmp_path / "model.ckpt")
    monkeypatch.setattr("uad_plugins.models.backbones.load_backbone", lambda *_: pytest.fail("weights were fetched"))
    loaded = cls.load_from_checkpoint(path, map_location="cpu").eval()
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected, found = model.model(images), loaded.model(images)
    assert found.anomaly_map.shape[-2:] == SIZE
    assert torch.equal(found.anomaly_map, expected.anomaly_map)
    assert loaded.hparams["backbone"] == "resnet18"


@pytest.mark.parametrize(("cls", "theirs"), [(Stfpm, AnomalibStfpm), (ReverseDistillation, AnomalibReverseDistillation)])
def test_anomalibs_own_class_loads_the_checkpoint(cls, theirs, tmp_path):
    model = randomised(build(cls)).eval()
    path = checkpoint_of(model, tmp_path / "model.ckpt")
    # Without a network anomalib cannot build its STFPM by the plain name: the alias stands in for timm's hub.
    options = {"backbone": alias("resnet18")} if cls is Stfpm else {}
    with backbone_weights(CHECKPOINT):
        loaded = theirs.load_from_checkpoint(path, map_location="cpu", **options).eval()
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) or torch.isnan(expected[key]).all() for key in expected)


def test_reverse_distillation_refuses_what_it_has_no_decoder_for():
    with pytest.raises(UsageError, match="unknown backbone 'resnet26'"):
        ReverseDistillation(backbone="resnet26", weights="bundled")
    with pytest.raises(UsageError, match="takes the layers"):
        ReverseDistillation(backbone="resnet18", layers=["layer1"], weights="bundled")


def test_cosine_ends_at_zero():
    assert math.isclose(learning_rate_factor(OptimizerConfig(schedule="cosine"), 2.0), 0.0, abs_tol=1e-12)


@pytest.mark.parametrize("known", [(), ("nut", "ring")])
@pytest.mark.parametrize("cls", [Stfpm, ReverseDistillation])
def test_the_loss_depends_on_every_parameter_that_is_open(cls, known, monkeypatch):
    """Processes that train together wait for the gradients of all of them."""
    model = in_training(cls, monkeypatch, conditional_norm=bool(known), categories=known)
    batch = UnifiedBatch(image=torch.rand(2, 3, *SIZE), gt_label=torch.zeros(2, dtype=torch.long), category=["nut", "ring"])
    model.training_step(batch)["loss"].backward()
    trained = {id(parameter) for parameter in model.trained_parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in model.model.parameters() if parameter.grad is not None}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
