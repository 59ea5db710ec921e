"""Conditional batch normalization: a student that knows which product it sees."""

import csv
import shutil
from copy import deepcopy

import pytest
import torch
from anomalib.models import Stfpm as AnomalibStfpm
from lightning.pytorch import Trainer
from networks import lively
from runs import INT8_BACKENDS, quantized_as_it_was, small_run
from students import SIZE, build, good_batch, in_training

from uad_plugins.artifacts import Run
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models import ReverseDistillation, Stfpm
from uad_plugins.models.backbones import CHECKPOINT, alias, backbone_weights
from uad_plugins.models.conditional import ConditionalNorm, RecognisingTeacher, rows_of, settle
from uad_plugins.models.torch_detector import TorchDetector

METHODS = (Stfpm, ReverseDistillation)
NAMES = ["nut", "ring", "washer"]


def images(count=4, seed=0):
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def norms(model):
    return [module for module in model.modules() if isinstance(module, ConditionalNorm)]


def loss(model, batch, products):
    with model.recogniser().told(products):
        return model.loss_with_anomalies(batch, batch, torch.zeros_like(batch[:, :1]))


OPTIONS = {"conditional_norm": True, "categories": NAMES}
BY_PRODUCT = {**OPTIONS, "products_apart": True}


@pytest.mark.parametrize("options", [OPTIONS, BY_PRODUCT])
@pytest.mark.parametrize("cls", METHODS)
def test_untrained_it_is_the_usual_network(cls, options):
    usual, ours = (build(cls, **each).eval() for each in ({}, options))
    assert len(norms(ours)) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in usual.parts(usual.model)[1].modules())
    with torch.no_grad():
        assert torch.allclose(usual.model(images()).anomaly_map, ours.model(images()).anomaly_map, atol=1e-5)


@pytest.mark.parametrize("cls", METHODS)
def test_each_image_gets_the_scale_and_shift_of_its_product(cls):
    """What another image of the batch shows makes no difference, nor what is recognised while the product is known."""
    model = build(cls, conditional_norm=True, categories=NAMES).eval()
    for norm in norms(model):
        for weight in norm.scale.weight, norm.shift.weight:
            torch.nn.init.normal_(weight, std=0.3)
    teacher, batch = model.recogniser(), images(1).expand(3, -1, -1, -1)

    def maps(products):
        with torch.no_grad(), teacher.told(torch.tensor(products)):
            return model.distil(model.model, batch)[1]

    one, other = maps([0, 1, 2]), maps([2, 1, 0])
    assert torch.allclose(one, other.flip(0), atol=1e-5)
    assert (one[0] - one[1]).abs().max() > 1e-3
    norm, features = norms(model)[0], torch.randn(3, norms(model)[0].norm.num_features, 4, 4)
    with teacher.told(torch.tensor([2, 0, 0])), torch.no_grad():
        teacher(batch)
        scale, shift = (each.weight[:, [2, 0, 0], 0, 0].T[..., None, None] for each in (norm.scale, norm.shift))
        assert torch.allclose(norm(features), norm.norm(features) * (1 + scale) + shift, atol=1e-6)


@pytest.mark.parametrize("cls", METHODS)
def test_the_student_alone_is_trained(cls):
    model = build(cls, conditional_norm=True, categories=NAMES).train()
    loss(model, images(), torch.tensor([0, 1, 2, 0])).backward()
    assert sum(norm.scale.weight.grad is not None for norm in norms(model)) >= len(norms(model)) - 1
    assert all(p.grad is None for p in model.recogniser().parameters())
    trained = {id(p) for p in model.trained_parameters()}
    assert trained >= {id(p) for norm in norms(model) for p in norm.parameters()}
    assert not trained & {id(p) for p in model.recogniser().parameters()}


def test_each_product_is_normalised_by_itself():
    model = lively(build(Stfpm, **BY_PRODUCT)).train()
    norm, teacher = norms(model)[0], model.recogniser()
    norm.norm.momentum = 1.0
    features, rows = torch.randn(5, norm.norm.num_features, 4, 4), torch.tensor([2, 0, 2, 2, 0])
    features[rows == 2] *= 3
    means, weight, bias = norm.means.clone(), norm.norm.weight, norm.norm.bias
    with teacher.told(rows):
        teacher(images(5))
        trained = norm(features)
        for product in 0, 2:
            mine = features[rows == product]
            normal = torch.nn.functional.batch_norm(mine, None, None, weight, bias, training=True)
            scale, shift = (each.weight[:, product] for each in (norm.scale, norm.shift))
            assert torch.allclose(trained[rows == product], normal * (1 + scale) + shift, atol=1e-5)
            assert torch.allclose(norm.means[product], mine.mean(dim=(0, 2, 3)), atol=1e-6)
            assert torch.allclose(norm.variances[product], mine.transpose(0, 1).flatten(1).var(dim=1), atol=1e-5)
        model.eval()
        # By what is kept of each; the variance kept is that of a sample.
        assert torch.allclose(norm(features), trained, atol=0.1)
    assert torch.equal(norm.means[1], means[1])


@pytest.mark.parametrize(("cls", "weight"), [(Stfpm, 3.0), (ReverseDistillation, 3.0), (ReverseDistillation, None)])
def test_each_product_of_a_batch_is_learnt_as_if_it_were_alone(cls, weight, monkeypatch):
    options = {"synthetic_anomalies": 1.0, "anomaly_fillings": ["foreign"], "anomaly_weight": weight}
    if cls is ReverseDistillation:
        options["hard_mining"] = 0.75
    model = in_training(cls, monkeypatch, **BY_PRODUCT, **options)
    batch, names = images(6), ["ring", "nut", "ring", "ring", "nut", "ring"]
    with model.recogniser().told(rows_of(names, NAMES)):
        drawn, opacity = model.with_anomalies(batch, 0, model.groups())
    assert model.groups() is None

    weight = norms(model)[-2].norm.weight

    def learnt(rows):
        # A batch is brought in the order of its products.
        order = sorted(rows, key=lambda row: NAMES.index(names[row]))
        monkeypatch.setattr(model, "with_anomalies", lambda *_: (drawn[order], opacity[order]))
        some = good_batch(batch[rows])
        some.category = [names[row] for row in rows]
        result = model.training_step(some)["loss"]
        assert some.category == [names[row] for row in rows]
        return torch.cat([result.reshape(1), *torch.autograd.grad(result, weight)])

    whole, nuts, rings = learnt(range(6)), learnt([1, 4]), learnt([0, 2, 3, 5])
    assert whole[1:].abs().max() > 0
    assert torch.allclose(whole, (2 * nuts + 4 * rings) / 6, rtol=1e-3, atol=1e-6)


def test_a_product_with_a_single_value_has_no_variance():
    model = build(Stfpm, **BY_PRODUCT).train()
    with model.recogniser().told(torch.tensor([0, 1, 1])):
        model.recogniser()(images(3))
        assert norms(model)[0](torch.randn(3, 64, 1, 1)).isfinite().all()


@pytest.mark.parametrize("cls", METHODS)
def test_it_is_deployed_with_one_normalization(cls):
    model = lively(build(cls, **BY_PRODUCT)).eval()
    batch, products = images(3), torch.tensor([2, 0, 1])
    torch.nn.init.normal_(model.recogniser().classifier.weight, std=0.1)

    @torch.no_grad()
    def maps():
        recognised = model.distil(model.model, batch)[1]
        with model.recogniser().told(products):
            return torch.cat([recognised, model.distil(model.model, batch)[1]])

    before = maps()
    for _ in range(2):
        settle(model.model)
        assert torch.allclose(maps(), before, rtol=1e-4, atol=1e-5)
    usual = build(cls, **OPTIONS)
    assert model.model.state_dict().keys() == usual.model.state_dict().keys()


def test_statistics_of_products_need_products():
    with pytest.raises(UsageError, match="products_apart needs products that are told apart"):
        build(Stfpm, products_apart=True)


@pytest.mark.parametrize("count", [2, 3])
def test_products_are_told_apart_by_what_the_teacher_sees(count):
    """Each of its own tint and brightness; one of them shown ten times as often as another."""
    model = build(Stfpm, conditional_norm=True, categories=NAMES[:count]).eval()
    teacher, tints = model.recogniser(), torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.4, 0.4, 0.1]])
    products = torch.tensor([0, 1] * 10 + [count - 1] * 2)

    def parts(products, seed):
        return tints[products][..., None, None] + 0.4 * images(len(products), seed)

    assert not teacher.has_learnt
    teacher.learn([(parts(some, seed), some) for seed, some in enumerate(products.split(5))])
    assert teacher.has_learnt
    with torch.no_grad():
        teacher(parts(products, 9))
    found = teacher.recognised.products.flatten(1)
    assert found.shape == (len(products), count)
    assert torch.allclose(found.sum(dim=1), torch.ones(len(products)))
    assert (found[range(len(products)), products] > 0.9).all()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        teacher(parts(products, 9))
    assert torch.allclose(teacher.recognised.products.flatten(1).float(), found, atol=0.1)
    with pytest.raises(UadxError, match="a product without a training image"):
        teacher.learn([(parts(products[:1], 0), products[:1])])


class Seen(torch.nn.Module):
    """A teacher that sees the pixels, channel by channel."""

    def forward(self, images):
        return {"layer1": images, "layer2": images[..., ::2, ::2]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_told_apart_by_how_much_they_vary(dtype):
    """Alike in the mean, as smooth and grainy material of one colour may be."""
    teacher, products = RecognisingTeacher(Seen(), 6, 2), torch.tensor([0, 1] * 20)
    grain = torch.tensor([0.1, 0.2])[products][:, None, None, None]

    def parts(seed):
        noise = torch.randn(len(products), 3, *SIZE, generator=torch.Generator().manual_seed(seed))
        return 0.5 + grain * (noise - noise.mean(dim=(2, 3), keepdim=True))

    teacher.learn([(parts(0), products)])
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        teacher(parts(1).to(dtype))
    found = teacher.recognised.products.flatten(1).float()
    assert (found[range(len(products)), products] > 0.9).all()


def test_a_channel_that_is_everywhere_the_same_has_a_gradient():
    """Scales of the teacher's quantizers are trained through what recognises the product."""
    teacher, flat = RecognisingTeacher(Seen(), 6, 2), torch.zeros(1, 3, *SIZE, requires_grad=True)
    torch.nn.init.normal_(teacher.classifier.weight)
    teacher(flat)
    (gradient,) = torch.autograd.grad(teacher.recognised.products[0, 0, 0, 0], flat)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_copy_made_in_the_middle_of_a_training_works_by_itself():
    model = build(Stfpm, conditional_norm=True, categories=NAMES).train()
    loss(model, images(), torch.tensor([0, 1, 2, 0]))
    copy = deepcopy(model).eval()
    assert {id(norm.recognised) for norm in norms(copy)} == {id(copy.recogniser().recognised)}
    assert copy.recogniser().recognised is not model.recogniser().recognised
    assert copy.model(images(2)).anomaly_map.shape == (2, 1, *SIZE)


def test_products_that_are_not_known_are_refused():
    assert rows_of(["ring", "nut"], NAMES).tolist() == [1, 0]
    with pytest.raises(UadxError, match="the model does not know 'board'"):
        rows_of(["board", "nut"], NAMES)
    with pytest.raises(UadxError, match="does not say which products"):
        rows_of(None, NAMES)


@pytest.mark.parametrize("name", ["stfpm", "reverse_distillation"])
def test_one_product_is_trained_as_usual(name, products, tmp_path):
    over = {"data": {"categories": ["washer"]}, "trainer": {"max_epochs": 1}}
    model = {"name": name, "options": {"conditional_norm": True, "synthetic_anomalies": 0.5}}
    small_run(products, tmp_path / "run", {"model": model, **over})
    trained = TorchDetector.load(Run(tmp_path / "run")).model
    assert not norms(trained)
    assert trained.recogniser() is None


@pytest.fixture(scope="module", params=[False, True])
def run(request, products, tmp_path_factory):
    options = {"conditional_norm": True, "products_apart": request.param, "synthetic_anomalies": 0.8}
    folder = tmp_path_factory.mktemp("conditional") / "run"
    small_run(products, folder, {"model": {"options": options}, "trainer": {"max_epochs": 4}})
    return folder


def test_it_is_trained_and_loaded_as_it_was(run):
    model = TorchDetector.load(Run(run)).model
    assert sorted(model.products) == sorted(Run(run).manifest().categories)
    saved = torch.load(run / "model.ckpt", map_location="cpu", weights_only=False)["state_dict"]
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"])
    assert all(norm.scale.weight.abs().max() > 0 and norm.shift.weight.abs().max() > 0 for norm in norms(model))
    (log,) = (run / "logs" / "csv").rglob("metrics.csv")
    assert [float(row["val_recognised"]) for row in read_csv(log) if row["val_recognised"]] == [1.0] * 4
    with backbone_weights(CHECKPOINT), pytest.raises(RuntimeError, match="teacher_model"):
        AnomalibStfpm.load_from_checkpoint(run / "model.ckpt", map_location="cpu", backbone=alias("resnet18"))


def test_a_category_with_test_images_alone_is_no_product(products, tmp_path):
    for name in ("washer", "fabric"):
        shutil.copytree(products / name, tmp_path / "data" / name)
    shutil.rmtree(tmp_path / "data" / "fabric" / "train")
    over = {"model": {"options": {"conditional_norm": True}}, "trainer": {"max_epochs": 1}}
    small_run(tmp_path / "data", tmp_path / "run", over)
    assert TorchDetector.load(Run(tmp_path / "run")).model.recogniser() is None


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fresh_model_takes_its_checkpoint(run, products):
    options = Run(run).config().model.options
    model = build(Stfpm, conditional_norm=True, products_apart=options["products_apart"])
    data = UnifiedDataModule(str(products), image_size=64, num_workers=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=run.parent)
    (found,) = trainer.validate(model, datamodule=data, ckpt_path=run / "model.ckpt", verbose=False)
    assert found["val_recognised"] == 1.0
    saved = torch.load(run / "model.ckpt", map_location="cpu", weights_only=False)["state_dict"]
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in model.model.state_dict().items())


def test_layers_may_be_named_in_any_order():
    model = build(Stfpm, layers=["layer3", "layer1"], conditional_norm=True, categories=NAMES).eval()
    assert model.model(images(2)).anomaly_map.shape == (2, 1, *SIZE)


def test_it_is_resumed(products, tmp_path):
    over = {"model": {"options": {"conditional_norm": True}}, "trainer": {"max_epochs": 1}}
    small_run(products, tmp_path / "run", over)
    start = TorchDetector.load(Run(tmp_path / "run")).model.model.state_dict()
    metrics = small_run(products, tmp_path / "run", over, given={"trainer": {"max_epochs": 2}}, resume=True)
    assert metrics["epochs"] == 2
    assert TorchDetector.load(Run(tmp_path / "run")).model.model.state_dict().keys() == start.keys()


def test_it_is_taught_by_specialists_and_is_none(run, products, tmp_path):
    options = {"synthetic_anomalies": 0.8, "conditional_norm": True}
    categories = Run(run).manifest().categories
    for name in categories:
        over = {"data": {"categories": [name]}, "trainer": {"max_epochs": 1}}
        small_run(products, tmp_path / "specialists" / name, {"model": {"options": options}, **over})
    taught = options | {"specialists": str(tmp_path / "specialists")}
    small_run(products, tmp_path / "run", {"model": {"options": taught}, "trainer": {"max_epochs": 1}})
    assert len(norms(TorchDetector.load(Run(tmp_path / "run")).model)) == 15
    wrong = options | {"specialists": str(run.parent)}
    with pytest.raises(UadxError, match="is told its products by its own teacher"):
        small_run(products, tmp_path / "wrong", {"model": {"options": wrong}, "trainer": {"max_epochs": 1}})


@pytest.mark.parametrize(("backend", "options"), INT8_BACKENDS)
def test_it_is_quantized(backend, options, run, products, tmp_path):
    quantized_as_it_was(run, products, tmp_path / "q", backend, options)
