"""STFPM with a student of another architecture than its teacher's."""

import pytest
import torch
from anomalib.models import Stfpm as AnomalibStfpm
from runs import INT8_BACKENDS, quantized_as_it_was, small_run
from students import SIZE, build, randomised

from uad_plugins.artifacts import Run
from uad_plugins.errors import UsageError
from uad_plugins.models import Stfpm
from uad_plugins.models.backbones import CHECKPOINT, alias, backbone_weights
from uad_plugins.models.torch_detector import TorchDetector

SEEING = "seresnet18"


def changed_far_away(network, images):
    """Return how much the first layer's last corner changes with the first pixels of the images."""
    other = images.clone()
    other[..., :16, :16] += 1.0
    with torch.no_grad():
        before, after = network(images)["layer1"], network(other)["layer1"]
    return (before - after)[..., -2:, -2:].abs().max().item()


def test_it_sees_the_whole_image_where_its_teacher_does_not():
    model = randomised(build(Stfpm, student_backbone=SEEING)).eval()
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    teacher, student = model.model.teacher_model(images), model.model.student_model(images)
    assert {name: each.shape for name, each in student.items()} == {name: each.shape for name, each in teacher.items()}
    assert changed_far_away(model.model.teacher_model, images) == 0
    assert changed_far_away(randomised(build(Stfpm)).eval().model.student_model, images) == 0
    assert changed_far_away(model.model.student_model, images) > 1e-4


def test_only_the_student_is_another():
    ours, usual = build(Stfpm, student_backbone=SEEING), build(Stfpm)
    mine, theirs = (
        {name for name, _ in model.named_parameters() if "teacher_model" in name or ".se." not in name}
        for model in (ours, usual)
    )
    assert mine == theirs
    trained = {id(p) for p in ours.trained_parameters()}
    assert trained == {id(p) for p in ours.model.student_model.parameters()}
    pairs = zip(ours.model.teacher_model.parameters(), usual.model.teacher_model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_any_resnet_of_the_same_shapes_will_do():
    assert build(Stfpm, student_backbone="resnet18d").model.student_model.out_dims == [64, 128, 256]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("seresnet50", "features of seresnet50 are 256 at 1/4.*those of the teacher 64 at 1/4"),
        ("seresnet81", "model.options.student_backbone: unknown backbone 'seresnet81'"),
        ("vit_tiny_patch16_224", "unknown backbone"),
        ("resnet18.a1_in1k", "a student begins with none"),
    ],
)
def test_one_that_does_not_fit_is_refused(student, message):
    with pytest.raises(UsageError, match=message):
        build(Stfpm, student_backbone=student)


@pytest.fixture(scope="module")
def run(products, tmp_path_factory):
    options = {"student_backbone": SEEING, "synthetic_anomalies": 0.8}
    folder = tmp_path_factory.mktemp("seeing") / "run"
    small_run(products, folder, {"model": {"options": options}, "trainer": {"max_epochs": 2}})
    return folder


def test_it_is_trained_and_loaded_as_it_was(run):
    student = TorchDetector.load(Run(run)).model.model.student_model
    start = build(Stfpm, student_backbone=SEEING).model.student_model.state_dict()
    saved = torch.load(run / "model.ckpt", map_location="cpu", weights_only=False)["state_dict"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, saved[f"model.student_model.{name}"])
        if ".se." in name:
            assert not torch.equal(value, start[name])
    with backbone_weights(CHECKPOINT), pytest.raises(RuntimeError, match="student_model"):
        AnomalibStfpm.load_from_checkpoint(run / "model.ckpt", map_location="cpu", backbone=alias("resnet18"))


def test_specialists_without_it_teach_one_with_it(products, tmp_path):
    options = {"synthetic_anomalies": 0.8}
    over = {"data": {"categories": ["washer"]}, "trainer": {"max_epochs": 1}}
    small_run(products, tmp_path / "specialists" / "washer", {"model": {"options": options}, **over})
    options |= {"student_backbone": SEEING, "specialists": str(tmp_path / "specialists")}
    small_run(products, tmp_path / "run", {"model": {"options": options}, **over})
    assert list(Run(tmp_path / "run").manifest().method["specialists"]) == ["washer"]


@pytest.mark.parametrize(("backend", "options"), INT8_BACKENDS)
def test_it_is_quantized(backend, options, run, products, tmp_path):
    quantized_as_it_was(run, products, tmp_path / "q", backend, options)
