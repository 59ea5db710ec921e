"""Uninformed Students: patch networks, losses, statistics and maps against the paper's definitions."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uad_plugins.models.uninformed_students.grids import Grid, grid_of_step
from uad_plugins.models.uninformed_students.networks import (
    PatchNetwork,
    dense_max_pool,
    multiply_accumulates,
    receptive_field,
)
from uad_plugins.models.uninformed_students.torch_model import (
    Deviations,
    Moments,
    UninformedStudentsModel,
    predictive_variance,
)

PATCH_SIZES = (17, 33, 65)


def network(patch_size, copies=1, width=1 / 16, stride=1, seed=0):
    torch.manual_seed(seed)
    made = PatchNetwork(patch_size, copies, width, stride).eval()
    for convolution in made.convolutions:
        # Larger than torch's own, so that descriptors differ by more than rounding.
        nn.init.normal_(convolution.weight, std=(2 / convolution.weight[0].numel()) ** 0.5)
    return made


def model(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"patch_sizes": (17, 33), "students": 3, "width": 1 / 16, "stride": 4, **options}
    made = UninformedStudentsModel(**settings).eval()
    made.feature_mean.normal_(0, 0.01)
    made.feature_std.uniform_(0.05, 0.1)
    made.score_mean.uniform_(0.5, 1)
    made.score_std.uniform_(0.5, 2)
    return made


# Patch networks


@pytest.mark.parametrize(("patch_size", "millions"), [(17, 3.0), (33, 1.6), (65, 1.4)])
def test_the_networks_are_the_papers(patch_size, millions):
    made = PatchNetwork(patch_size)
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert made(torch.zeros(2, 3, patch_size, patch_size)).shape == (2, 1, 128)
    assert not [m for m in made.modules() if isinstance(m, nn.Dropout | nn.BatchNorm2d)]


def test_what_is_below_zero_leaks_by_half_a_percent():
    made = PatchNetwork(17, 1, 1 / 16).eval()
    with torch.no_grad():
        for convolution in made.convolutions:
            convolution.weight.zero_()
            convolution.bias.zero_()
            convolution.weight[:, 0, 0, 0] = 1
        made.convolutions[0].bias.fill_(-1.0)
        # Through three activations, and through no fourth: the last layer is linear.
        expected = torch.full((1, 1, 128), -(0.005**3))
        assert torch.allclose(made(torch.zeros(1, 3, 17, 17)), expected, rtol=1e-4)
        assert torch.allclose(made.dense(torch.zeros(1, 3, 18, 18))[..., 9, 9], expected, rtol=1e-4)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_every_grid_of_pixels_sees_the_border_as_the_dense_evaluation_does(patch_size):
    # A student trained on patches whose border looks otherwise finds every border anomalous.
    made, image = network(patch_size), torch.rand(1, 3, 68, 72)
    with torch.no_grad():
        every = made.dense(image, Grid(1))
        for down, right in [(0, 0), (0, 3), (2, 1), (3, 3)]:
            found = made.dense(image, Grid(4, (down, right)))
            assert torch.allclose(found, every[..., down::4, right::4], atol=1e-5)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_a_window_of_a_grid_has_the_descriptors_that_the_whole_has_there(patch_size):
    made, image = network(patch_size), torch.rand(1, 3, 68, 72)
    with torch.no_grad():
        every = made.dense(image)
        for top, left, height, width in [(0, 0, 68, 72), (0, 0, 9, 5), (59, 67, 9, 5), (30, 20, 8, 8)]:
            found = made.dense(image, Grid(window=(top, left, height, width)))
            assert torch.allclose(found, every[..., top : top + height, left : left + width], atol=1e-5)
        found = made.dense(image, Grid(4, (3, 1), (5, 10, 4, 8)))
        assert torch.allclose(found, every[..., 3::4, 1::4][..., 5:9, 10:18], atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "side", "steps"),
    [((64, 64), 1, 16, 16), ((64, 48), 4, 16, 192), ((50, 37), 2, 20, 24), ((32, 32), 1, 99, 1)],
)
def test_in_turn_the_steps_of_a_training_reach_every_pixel(size, stride, side, steps):
    reached = torch.zeros(size[0] + stride, size[1] + stride)
    for step in range(1000, 1000 + steps):
        grid = grid_of_step(step, size, stride, side)
        (down, right), (top, left, height, width) = grid.offset, grid.window
        assert top + height <= grid.shape(size)[0] and left + width <= grid.shape(size)[1]
        assert max(height, width) <= -(-side // stride)
        reached[down::stride, right::stride][top : top + height, left : left + width] += 1
    reached = reached[: size[0], : size[1]]
    assert reached.min() >= 1
    # Where windows fit the image, each pixel exactly as often.
    if side in (16, 99):
        assert reached.max() == 1
    assert grid_of_step(1000, size, stride, side) == grid_of_step(1000 + steps, size, stride, side)


@pytest.mark.parametrize(("stride", "side"), [(1, 64), (1, 32), (4, 64)])
def test_a_few_steps_are_spread_over_the_image(stride, side):
    places = [np.array(grid_of_step(step, (256, 256), stride, side).window[:2]) * stride for step in range(70)]
    assert all((np.ptp(places[first : first + 6], axis=0) >= 96).all() for first in range(64))


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_dense_evaluation_is_patch_by_patch_evaluation(patch_size, stride):
    made = network(patch_size, 2, stride=stride)
    generator = torch.Generator().manual_seed(patch_size + stride)
    image = torch.randn(1, 3, 70, 83, generator=generator)
    half = patch_size // 2
    around = F.pad(image, (half + 8,) * 4, mode="reflect")
    with torch.no_grad():
        dense = made.dense(image)[0]
        assert dense.shape == (2, 128, -(-70 // stride), -(-83 // stride))
        rows = torch.randint(dense.shape[-2], (12,), generator=generator).tolist()
        columns = torch.randint(dense.shape[-1], (12,), generator=generator).tolist()
        # The corners too, where the image is mirrored.
        for i, j in [(0, 0), (dense.shape[-2] - 1, dense.shape[-1] - 1), *zip(rows, columns, strict=True)]:
            y, x = i * stride + (stride - 1) // 2 + 8, j * stride + (stride - 1) // 2 + 8
            patch = around[..., y : y + patch_size, x : x + patch_size]
            assert torch.allclose(dense[:, :, i, j], made(patch)[0], atol=1e-5)
    assert dense.std(dim=(-2, -1)).min() > 1e-3


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_an_output_stride_leaves_out_outputs_and_changes_none(patch_size):
    image = torch.randn(1, 3, 72, 72)
    made = network(patch_size)
    with torch.no_grad():
        every = made.dense(image)
        for stride in (2, 4, 8):
            offset = (stride - 1) // 2
            assert torch.allclose(made.dense(image, Grid(stride)), every[..., offset::stride, offset::stride], atol=1e-5)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_the_receptive_field_is_what_gradients_say(patch_size):
    patch = torch.randn(1, 3, patch_size, patch_size, requires_grad=True)
    network(patch_size)(patch).sum().backward()
    touched = (patch.grad.abs().sum(dim=(0, 1)) > 0).any(dim=1).nonzero()
    assert int(touched.max()) - int(touched.min()) + 1 <= receptive_field(patch_size) <= patch_size


def test_students_computed_together_are_separate_networks():
    together = network(33, copies=3, stride=2)
    image = torch.randn(2, 3, 64, 64)
    for number in range(3):
        alone = network(33, stride=2, seed=9)
        for mine, grouped in zip(alone.convolutions, together.convolutions, strict=True):
            mine.weight.data = grouped.weight.data.unflatten(0, (3, -1))[number].clone()
            mine.bias.data = grouped.bias.data.unflatten(0, (3, -1))[number].clone()
        with torch.no_grad():
            assert torch.allclose(together.dense(image)[:, number], alone.dense(image)[:, 0], atol=1e-5)


def test_students_start_differently_and_unlike_their_teacher():
    made = UninformedStudentsModel((33,), 3, 1 / 16)
    first = made.students[0].convolutions[1].weight.unflatten(0, (3, -1))
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[1], first[2])
    assert not torch.allclose(first[0], made.teachers[0].convolutions[1].weight)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_dense_pooling_is_dilated_pooling(dilation):
    x = torch.randn(1, 2, 12, 13)
    assert torch.equal(dense_max_pool(x, dilation), F.max_pool2d(x, 2, stride=1, dilation=dilation))


def test_multiply_accumulates_of_the_densest_layer():
    # The paper's 33 network on one pixel wide output: counted by hand for the first convolution of a 64 pixel image.
    made = PatchNetwork(33, width=1.0)
    total = multiply_accumulates(made, (64, 64))
    # 64 + 31 rows are padded in; each dense layer's output is smaller by its kernel's reach.
    sides = (64 + 31 - 4, 64 + 31 - 4 - 1 - 8, 64 + 31 - 4 - 1 - 8 - 2 - 4, 64)
    weights = [3 * 25 * 128, 128 * 25 * 256, 256 * 4 * 256, 256 * 16 * 128]
    assert total == sum(side * side * weight for side, weight in zip(sides, weights, strict=True))
    assert multiply_accumulates(PatchNetwork(33, stride=4), (64, 64)) < total / 4


@pytest.mark.parametrize("wrong", [{"patch_size": 31}, {"stride": 3}])
def test_a_network_that_does_not_exist(wrong):
    with pytest.raises(ValueError, match="one of"):
        PatchNetwork(**{"patch_size": 33, **wrong})


# Students, statistics, maps


def test_error_variance_and_loss_by_definition():
    made = model()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = made.deviations(images)
        for scale in range(2):
            target = made.teachers[scale].dense(images)[:, 0]
            mean, std = made.feature_mean[scale, 0], made.feature_std[scale, 0]
            wanted = (target - mean[:, None, None]) / std[:, None, None]
            students = made.students[scale].dense(images)
            error = (students.mean(dim=1) - wanted).square().sum(dim=1)
            # The paper's form: mean of squared norms minus the squared norm of the mean.
            paper = students.square().sum(dim=2).mean(dim=1) - students.mean(dim=1).square().sum(dim=1)
            assert torch.allclose(found.errors[:, scale], error, rtol=1e-4)
            assert torch.allclose(found.variances[:, scale], paper, rtol=1e-3, atol=1e-4)
        expected = sum(
            (made.students[s].dense(images) - ((made.targets(images)[s] - made.feature_mean[s, 0][:, None, None])
             / made.feature_std[s, 0][:, None, None])).square().sum(2).mean((1, 2, 3))
            for s in range(2)
        )  # fmt: skip
    assert torch.allclose(found.losses, expected, rtol=1e-4)


def test_the_variance_does_not_cancel_in_half_precision():
    offset = 30 + torch.tensor([-0.25, 0.0, 0.25])
    students = offset[None, :, None, None, None].expand(1, 3, 128, 1, 1).half()
    true = 128 * float(torch.tensor([0.0625, 0, 0.0625]).mean())
    assert float(predictive_variance(students, students.mean(dim=1, keepdim=True))) == pytest.approx(true, rel=0.01)


def test_a_network_in_half_precision_computes_the_variance_that_does_not_cancel(monkeypatch):
    made = model(patch_sizes=(17,), stride=4).half()
    students = (30 + torch.tensor([-0.25, 0.0, 0.25])).half()[None, :, None, None, None].expand(1, 3, 128, 2, 2)
    monkeypatch.setattr(made.students[0], "dense", lambda *_: students)
    monkeypatch.setattr(made, "targets", lambda *_: [torch.zeros(1, 1, 128, 2, 2).half()])
    found = made.deviations(torch.zeros(1, 3, 8, 8).half()).variances
    assert torch.allclose(found.float(), torch.full((1, 1, 2, 2), 128 * 0.125 / 3), rtol=0.01)


def test_the_losses_alone_are_those_of_the_deviations():
    made, images = model(categories=2), torch.randn(2, 3, 64, 64)
    category = torch.tensor([1, 0])
    with torch.no_grad():
        for grid in (None, Grid(2)):
            assert torch.equal(made.losses(images, category, grid), made.deviations(images, category, grid).losses)


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 64), (65, 47), (50, 59)])
def test_the_map_shows_a_descriptor_where_it_was_computed(size, stride):
    made = model(patch_sizes=(17,), students=1, stride=stride)
    made.score_mean.zero_()
    made.score_std.fill_(1)
    height, width = -(-size[0] // stride), -(-size[1] // stride)
    # Errors that say where the centre of their patch lies.
    rows = (torch.arange(height) * stride + (stride - 1) // 2).float()[:, None].expand(height, width)
    columns = (torch.arange(width) * stride + (stride - 1) // 2).float()[None].expand(height, width)
    for found, length, axis in ((rows, size[0], 0), (columns, size[1], 1)):
        errors = found[None, None]
        shown = made.anomaly_map(Deviations(torch.zeros(1), errors, torch.zeros_like(errors)), size)[0, 0]
        line = shown[:, 0] if axis == 0 else shown[0]
        # Beyond the centres of the outermost patches their values are repeated.
        inside = slice(stride // 2, min(length, len(found[:, 0] if axis == 0 else found[0]) * stride - stride // 2))
        assert (line[inside] - torch.arange(length)[inside]).abs().max() <= 0.5 + 1e-4


def test_the_map_is_the_mean_over_scales_of_both_z_scores_and_the_score_its_maximum():
    made = model(stride=1)
    images = torch.randn(2, 3, 48, 56)
    with torch.no_grad():
        found, output = made.deviations(images), made(images)
    expected = torch.zeros(2, 48, 56)
    for scale in range(2):
        for values, kind in ((found.errors, 0), (found.variances, 1)):
            expected += (values[:, scale] - made.score_mean[scale, 0, kind]) / made.score_std[scale, 0, kind] / 2
    assert torch.allclose(output.anomaly_map[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.pred_score, output.anomaly_map.amax(dim=(-2, -1)))


def test_a_single_student_has_no_variance():
    made = model(students=1, patch_sizes=(17,), stride=1)
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        found, output = made.deviations(images), made(images)
    expected = (found.errors[:, :1] - made.score_mean[0, 0, 0]) / made.score_std[0, 0, 0]
    assert torch.allclose(output.anomaly_map, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (65, 47), (40, 96)])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_map_has_the_size_of_the_input(size, stride):
    with torch.no_grad():
        output = model(stride=stride)(torch.randn(1, 3, *size))
    assert output.anomaly_map.shape == (1, 1, *size)


def test_statistics_by_category():
    made = model(categories=2, patch_sizes=(17,))
    images = torch.randn(1, 3, 48, 48).repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="by category"):
        made(images)
    with torch.no_grad():
        both = made(images, torch.tensor([0, 1])).anomaly_map
        assert not torch.allclose(both[0], both[1])
        swapped = made(images, torch.tensor([1, 0])).anomaly_map
        assert torch.allclose(swapped.flip(0), both)


def test_moments_are_those_of_all_values_together():
    values = torch.randn(100, 3, generator=torch.Generator().manual_seed(3)) * 5 + 1000
    moments = Moments((3, 3), torch.device("cpu"))
    for part in values[:60].split(7):
        moments.add(0, part)
    moments.add(1, values[60:])
    mean, std = moments.result()
    assert torch.allclose(mean[0], values[:60].mean(0))
    assert torch.allclose(std[1], values[60:].std(0, unbiased=False), rtol=1e-4)
    # A row that has seen nothing takes what all rows have seen.
    assert torch.allclose(mean[2], values.mean(0))
    assert torch.allclose(std[2], values.std(0, unbiased=False), rtol=1e-4)


def test_a_value_that_never_varies_can_be_divided_by():
    moments = Moments((1, 1), torch.device("cpu"))
    moments.add(0, torch.full((9, 1), 0.25))
    assert [float(x) for x in moments.result()] == [0.25, 1.0]


def test_no_student_is_refused():
    with pytest.raises(ValueError, match="at least one student"):
        UninformedStudentsModel(students=0)


# Export


def exported(made, images, path, *more):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = made

        def forward(self, *inputs):
            output = self.inner(*inputs)
            return output.pred_score, output.anomaly_map

    names = ["image", "category"][: 1 + len(more)]
    torch.onnx.export(Plain().eval(), (images, *more), str(path), dynamo=False, opset_version=17, input_names=names)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stride", "patch_sizes"), [(1, (17, 65)), (1, (33,)), (2, (33, 65)), (4, (33,)), (8, (65, 17))])
@pytest.mark.parametrize("size", [(72, 72), (80, 104), (75, 67)])
def test_onnx_and_openvino_agree_with_torch_at_any_size(tmp_path, size, stride, patch_sizes):
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    made = model(stride=stride, patch_sizes=patch_sizes)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = made(images)
    path = exported(made, images, tmp_path / "model.onnx")
    by_onnx = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": images.numpy()})
    compiled = openvino.compile_model(openvino.convert_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    by_openvino = list(compiled(images.numpy()).values())
    for score, anomaly_map in (by_onnx, by_openvino):
        scale = float(expected.anomaly_map.abs().max())
        assert np.abs(anomaly_map - expected.anomaly_map.numpy()).max() < 1e-3 * scale
        assert np.abs(score - expected.pred_score.numpy()).max() < 1e-3 * scale


@pytest.mark.filterwarnings("ignore")
def test_statistics_by_category_are_an_input_of_the_exported_graph(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    made = model(categories=3, patch_sizes=(33,))
    images, category = torch.randn(2, 3, 64, 64), torch.tensor([2, 0])
    session = onnxruntime.InferenceSession(
        exported(made, images, tmp_path / "model.onnx", category), providers=["CPUExecutionProvider"]
    )
    for wanted in ([2, 0], [1, 1]):
        with torch.no_grad():
            expected = made(images, torch.tensor(wanted)).anomaly_map
        found = session.run(None, {"image": images.numpy(), "category": np.array(wanted)})[1]
        assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
