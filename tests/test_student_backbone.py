"""STFPM with a student of another architecture than its teacher's."""

import pytest
import torch
from anomalib.models import Stfpm as AnomalibStfpm
from runs import small_run
from students import SIZE, build, randomised

from uad_plugins.artifacts import Run
from uad_plugins.errors import UsageError
from uad_plugins.models import Stfpm
from uad_plugins.models.backbones import CHECKPOINT, alias, backbone_weights
from uad_plugins.models.torch_detector import TorchDetector
from uad_plugins.quantization.quantize import Order, quantize

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


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("seresnet50", r"features of seresnet50 are 256 at 1/4.*those of the teacher 64 at 1/4"),
        ("resnet18d", None),
        ("seresnet81", "unknown backbone 'seresnet81'"),
        ("vit_tiny_patch16_224", "unknown backbone"),
    ],
)
def test_one_that_does_not_fit_is_refused(student, message):
    if message is None:
        assert build(Stfpm, student_backbone=student).model.student_model.out_dims == [64, 128, 256]
        return
    with pytest.raises(UsageError, match=message):
        build(Stfpm, student_backbone=student)


@pytest.fixture(scope="module")
def run(products, tmp_path_factory):
    options = {"student_backbone": SEEING, "synthetic_anomalies": 0.8}
    folder = tmp_path_factory.mktemp("seeing") / "run"
    small_run(products, folder, {"model": {"options": options}, "trainer": {"max_epochs": 2}})
    return folder


def test_it_is_trained_and_loaded_as_it_was(run):
    detector = TorchDetector.load(Run(run))
    student = detector.model.model.student_model
    assert [name for name, _ in student.named_modules() if name.endswith(".se")]
    start = build(Stfpm, student_backbone=SEEING).model.student_model
    assert not torch.equal(next(student.parameters()), next(start.parameters()))
    with backbone_weights(CHECKPOINT), pytest.raises(RuntimeError, match="student_model"):
        AnomalibStfpm.load_from_checkpoint(run / "model.ckpt", map_location="cpu", backbone=alias("resnet18"))


@pytest.mark.parametrize(
    ("backend", "options"),
    [("openvino-int8", {}), ("tensorrt-int8", {}), ("nncf-qat", {"epochs": 1, "accelerator": "cpu"})],
)
def test_it_is_quantized(backend, options, run, products, tmp_path):
    manifest = quantize(Order(run, tmp_path / "q", backend, samples=12, data=str(products), options=options))
    for agreement in manifest.agreement.values():
        assert agreement["map_l2"] < 0.15
        assert agreement["map_rank"] > 0.9
    assert manifest.auroc["mean"]["image_auroc"]["drop"] < 0.1
