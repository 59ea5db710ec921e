"""One student taught by the students of single products."""

import shutil

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.models import ReverseDistillation as AnomalibReverseDistillation
from anomalib.models import Stfpm as AnomalibStfpm
from runs import small_run
from students import SIZE, build, in_training, randomised
from torch import nn

from uad_plugins.artifacts import Run
from uad_plugins.data.batches import UnifiedBatch
from uad_plugins.data.products.synthesis import PRODUCTS
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models import ReverseDistillation, Stfpm
from uad_plugins.models.backbones import BUNDLED_FILE, alias, backbone_weights
from uad_plugins.models.descriptors import ANOMALOUS, distances
from uad_plugins.models.specialists import Specialists

DRAWN = {"synthetic_anomalies": 0.5}
CLASSES = {"stfpm": Stfpm, "reverse_distillation": ReverseDistillation}
NAMES = sorted(PRODUCTS)
WEIGHT = {"anomaly_weight": 2.0}
"""With it Reverse Distillation learns place by place."""


def of_method(name, **options):
    return {"model": {"name": name, "backbone": "resnet18", "options": {**DRAWN, **options}}, "trainer": {"max_epochs": 1}}


def taught_by(folder, name="stfpm", **over):
    return {**of_method(name, specialists=str(folder)), **over}


def train_each(products, folder, name, categories=NAMES):
    for category in categories:
        small_run(products, folder / category, {**of_method(name), "data": {"categories": [category]}})
    return folder


@pytest.fixture(scope="module", params=CLASSES)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def specialists(method, products, tmp_path_factory):
    """A run of each product. Not to be changed."""
    return train_each(products, tmp_path_factory.mktemp("specialists"), method)


@pytest.fixture(scope="module")
def washer(products, tmp_path_factory):
    """A run of STFPM on one product. Not to be changed."""
    return train_each(products, tmp_path_factory.mktemp("one"), "stfpm", ["washer"])


def two(cls):
    """Two specialists that differ, and the networks they come from."""
    networks = {}
    for name, low in (("nut", 0.5), ("bolt", 1.5)):
        networks[name] = randomised(build(cls)).model
        for module in cls.parts(networks[name])[1].modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, low, low + 0.5)
    return Specialists({name: [cls.parts(network)[1]] for name, network in networks.items()}), networks


def batch_of(*categories):
    images = torch.rand(len(categories), 3, *SIZE, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([sorted(set(categories)).index(name) for name in categories])
    return UnifiedBatch(
        image=images, gt_label=torch.zeros(len(categories)).bool(), category=list(categories), category_index=index
    )


def step_of(cls, monkeypatch, **options):
    """A model and its specialists' networks, a batch, the loss of a training step, and what was drawn into the images."""
    model = in_training(cls, monkeypatch, synthetic_anomalies=1.0, **options)
    model.specialists, networks = two(cls)
    batch = batch_of("nut", "bolt", "bolt", "nut")
    loss = model.training_step(batch)["loss"]
    return model, networks, batch, loss, *model.with_anomalies(batch.image)


def descriptor_loss(model, teacher, student, opacity, taught):
    """Written out: apart from the specialist, and less apart from the teacher than it is where an anomaly was drawn."""
    expected, (teacher, student, taught) = 0, (dict(enumerate(each)) for each in (teacher, student, taught))
    for apart, theirs, own in zip(
        distances(taught, student), distances(teacher, taught), distances(teacher, student), strict=True
    ):
        covered = nn.functional.adaptive_avg_pool2d(opacity, apart.shape[-2:])[:, 0] >= ANOMALOUS
        assert 0 < covered.float().mean() < 1
        expected = expected + apart.mean() + model.anomaly_weight * ((theirs - own).clamp(min=0) * covered).mean()
    return expected


def test_stfpm_learns_the_descriptors_of_each_images_specialist(monkeypatch):
    model, networks, batch, loss, drawn, opacity = step_of(Stfpm, monkeypatch)
    taught = [networks[name].student_model(drawn[row : row + 1]) for row, name in enumerate(batch.category)]
    taught = [torch.cat([each[layer] for each in taught]) for layer in taught[0]]
    expected = descriptor_loss(model, *(each.values() for each in model.model(drawn)), opacity, taught)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    model.specialists = Specialists({name: [networks["nut"].student_model] for name in networks})
    assert model.training_step(batch)["loss"].item() != pytest.approx(loss.item(), rel=1e-3)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.trained_parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for network in networks.values() for parameter in network.parameters())


@pytest.mark.parametrize("options", [{}, WEIGHT])
def test_reverse_distillation_restores_what_each_images_specialist_restores(options, monkeypatch):
    model, networks, batch, loss, drawn, opacity = step_of(ReverseDistillation, monkeypatch, **options)
    encoded, decoded = model.model(drawn)
    taught = [torch.empty_like(feature) for feature in encoded]
    for row, name in enumerate(batch.category):
        network = networks[name].eval()
        for whole, feature in zip(
            taught, network.decoder(network.bottleneck([part[row : row + 1] for part in encoded])), strict=True
        ):
            whole[row] = feature[0]

    def by(taught):
        if not options:
            return model.loss(taught, decoded).item()
        return descriptor_loss(model, encoded, decoded, opacity, taught).item()

    assert loss.item() == pytest.approx(by(taught), rel=1e-4)
    assert loss.item() != pytest.approx(by(encoded), rel=1e-3)
    loss.backward()
    assert all(parameter.grad is None for network in networks.values() for parameter in network.parameters())


@pytest.mark.parametrize(("cls", "options"), [(Stfpm, {}), (ReverseDistillation, {}), (ReverseDistillation, WEIGHT)])
def test_several_of_one_product_teach_their_mean(cls, options, monkeypatch):
    model, networks, batch, _, drawn, opacity = step_of(cls, monkeypatch, **options)
    several = {name: cls.parts(network)[1] for name, network in networks.items()}
    model.specialists = Specialists({"nut": [*several.values()], "bolt": [several["bolt"]]})
    loss = model.training_step(batch)["loss"].item()
    # Whole images in Reverse Distillation as published, otherwise places: what the loss takes for one direction.
    whole = cls is ReverseDistillation and not options
    dim = (1, 2, 3) if whole else 1
    shown = drawn if cls is Stfpm else model.model(drawn)[0]

    def unit(name, row):
        part = shown[row : row + 1] if cls is Stfpm else [feature[row : row + 1] for feature in shown]
        seen = several[name](part)
        return [nn.functional.normalize(feature, dim=dim) for feature in (seen.values() if cls is Stfpm else seen)]

    taught = []
    for row, name in enumerate(batch.category):
        teachers = [unit(other, row) for other in (["nut", "bolt"] if name == "nut" else ["bolt"])]
        taught.append([sum(layer) / len(teachers) for layer in zip(*teachers, strict=True)])
    taught = [torch.cat(layer) for layer in zip(*taught, strict=True)]
    teacher, student = ([*each.values()] if cls is Stfpm else each for each in model.model(drawn))
    expected = model.loss(taught, student) if whole else descriptor_loss(model, teacher, student, opacity, taught)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_a_student_that_does_as_its_specialist_has_nothing_to_learn(cls, monkeypatch):
    model = randomised(build(cls, synthetic_anomalies=0.5)).eval()
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    model.model.train()
    for part in model.model.modules():
        part.training = isinstance(part, type(model.model))
    model.specialists = Specialists({"nut": [cls.parts(model.model)[1]]})
    assert model.training_step(batch_of("nut", "nut"))["loss"].item() == pytest.approx(0, abs=1e-5)


def test_they_are_trained_from_a_folder_of_runs_and_not_needed_later(method, specialists, products, tmp_path):
    folder = shutil.copytree(specialists, tmp_path / "specialists")
    (folder / "notes").mkdir()
    (folder / "notes.txt").write_text("no run")
    metrics = small_run(products, tmp_path / "run", taught_by(folder, method))
    shutil.rmtree(folder)
    assert metrics["best_val_loss"] > 0
    record = Run(tmp_path / "run").manifest().method["specialists"]
    assert record == {name: [Run(specialists / name).manifest().checkpoint_sha256] for name in NAMES}
    loaded = CLASSES[method].load_from_checkpoint(tmp_path / "run" / "model.ckpt", map_location="cpu")
    assert loaded.specialists is None
    assert loaded.hparams["specialists"] is None
    # Of the unified one only: a checkpoint does not carry its teachers along.
    alone = CLASSES[method].load_from_checkpoint(specialists / "washer" / "model.ckpt", map_location="cpu")
    assert loaded.state_dict().keys() == alone.state_dict().keys()
    pairs = zip(loaded.trained_parameters(), alone.trained_parameters(), strict=True)
    assert not all(torch.equal(mine, theirs) for mine, theirs in pairs)
    with open_detector(tmp_path / "run") as detector:
        assert detector.categories == NAMES
    theirs = AnomalibStfpm if method == "stfpm" else AnomalibReverseDistillation
    backbone = {"backbone": alias("resnet18")} if method == "stfpm" else {}
    with backbone_weights("bundled"):
        theirs.load_from_checkpoint(tmp_path / "run" / "model.ckpt", map_location="cpu", **backbone)


def test_several_of_one_product_with_the_same_images_held_out(washer, products, tmp_path):
    folder, held_out = shutil.copytree(washer, tmp_path / "folder"), Run(washer / "washer").held_out()
    over = {**of_method("stfpm"), "data": {"categories": ["washer"], "split_seed": 0}, "seed": 1}
    small_run(products, folder / "again", over)
    runs = [Run(folder / name) for name in ("again", "washer")]
    assert all(run.held_out() == held_out and run.source()["seed"] == 0 for run in runs)
    small_run(products, tmp_path / "run", taught_by(folder, data={"categories": ["washer"]}))
    record = Run(tmp_path / "run").manifest().method["specialists"]
    assert record == {"washer": [run.manifest().checkpoint_sha256 for run in runs]}


@pytest.mark.parametrize(
    ("seed", "moved", "expected"),
    [(0, False, 0), (1, False, 1), (1, True, 0)],
    ids=["the same images held out", "others", "of other data"],
)
def test_images_that_they_were_trained_on_and_that_are_held_out_now(seed, moved, expected, washer, products, tmp_path):
    folder, lines = shutil.copytree(washer, tmp_path / "folder"), []
    if moved:
        (folder / "washer" / "split.json").write_text('{"val": ["elsewhere/train/good/001.png"]}')
    over = taught_by(folder, data={"categories": ["washer"], "split_seed": seed})
    small_run(products, tmp_path / "run", over, tell=lines.append)
    seen = Run(tmp_path / "run").held_out() - Run(washer / "washer").held_out()
    assert bool(seen) == (seed == 1)
    assert len(lines) == expected
    assert all(f"trained on {len(seen)} of the images held out here" in line for line in lines)


@pytest.mark.parametrize(("seed", "expected"), [(0, 0), (1, 1)])
def test_the_folder_of_their_product_is_the_same_data(seed, expected, products, tmp_path):
    lines, over = [], of_method("stfpm")
    small_run(products / "washer", tmp_path / "folder" / "washer", {**over, "data": {"split_seed": seed}})
    theirs = {f"washer/{name}" for name in Run(tmp_path / "folder" / "washer").held_out()}
    over = taught_by(tmp_path / "folder", data={"categories": ["washer"], "split_seed": 0})
    small_run(products, tmp_path / "run", over, tell=lines.append)
    assert (theirs == Run(tmp_path / "run").held_out()) == (expected == 0)
    assert len(lines) == expected


def test_a_killed_training_goes_on_with_them(washer, products, tmp_path, monkeypatch):
    over = taught_by(washer, data={"categories": ["washer"]}, trainer={"max_epochs": 2})
    small_run(products, tmp_path / "unbroken", over)
    step, seen = Stfpm.training_step, []

    def counted(self, batch, batch_idx=0, *args, **kwargs):
        seen.append(batch_idx)
        if seen == [0, 1, 0]:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Stfpm, "training_step", counted)
        with pytest.raises(UadxError, match="interrupted"):
            small_run(products, tmp_path / "run", over)
    small_run(products, tmp_path / "run", over, resume=True)
    one, other = (
        Stfpm.load_from_checkpoint(tmp_path / run / "last.ckpt", map_location="cpu") for run in ("unbroken", "run")
    )
    pairs = zip(one.trained_parameters(), other.trained_parameters(), strict=True)
    assert all(torch.equal(unbroken, resumed) for unbroken, resumed in pairs)


@pytest.mark.parametrize("change", ["added", "removed"])
def test_a_resumed_training_keeps_its_specialists(washer, products, tmp_path, change):
    folder, over = shutil.copytree(washer, tmp_path / "folder"), {"data": {"categories": ["washer"]}}
    small_run(products, folder / ".hidden", {**of_method("stfpm"), **over, "seed": 2})
    small_run(products, folder / "again", {**of_method("stfpm"), **over, "seed": 1})
    small_run(products, tmp_path / "run", taught_by(folder, **over))
    manifest = Run(tmp_path / "run").manifest()
    assert len(manifest.method["specialists"]["washer"]) == 2
    (folder / ("again" if change == "removed" else ".hidden")).rename(
        tmp_path / "elsewhere" if change == "removed" else folder / "new"
    )
    with pytest.raises(UadxError, match="specialists are not those that this training began with"):
        small_run(products, tmp_path / "run", taught_by(folder, **over, trainer={"max_epochs": 2}), resume=True)
    assert Run(tmp_path / "run").manifest() == manifest


def test_a_student_comes_closer_to_its_specialist(monkeypatch):
    """After some steps it does more of what the specialist does, on images it has not seen."""
    specialists, networks = two(Stfpm)
    model = build(Stfpm, synthetic_anomalies=0.5).train()
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    model.specialists = specialists
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.5, momentum=0.9)
    unseen = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(7))

    def apart():
        with torch.no_grad():
            mine = model.model.student_model(unseen)
            return sum(each.mean().item() for each in distances(networks["nut"].student_model(unseen), mine))

    before = apart()
    for _ in range(12):
        optimizer.zero_grad()
        model.training_step(batch_of(*["nut"] * 4))["loss"].backward()
        optimizer.step()
    assert apart() < 0.5 * before


def refused(products, tmp_path, folder, message, **over):
    with pytest.raises(UadxError, match=message) as error:
        small_run(products, tmp_path / "refused", taught_by(folder, **over))
    assert not (tmp_path / "refused").exists()
    return error.value


def test_without_a_folder_or_with_an_empty_one(products, tmp_path):
    refused(products, tmp_path, tmp_path / "missing", "missing: no such folder")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert "each product" in refused(products, tmp_path, tmp_path / "empty", "empty: there is no run in it").hint


def test_products_without_one_are_named_before_anything_is_written(washer, products, tmp_path):
    refused(products, tmp_path, washer, "there is none for 'connector', 'fabric'")
    small_run(products, tmp_path / "run", taught_by(washer, data={"categories": ["washer"]}))


def test_one_that_is_there_twice(washer, products, tmp_path):
    folder = shutil.copytree(washer, tmp_path / "folder")
    shutil.copytree(folder / "washer", folder / "again")
    refused(products, tmp_path, folder, "folder/washer and .*folder/again are the same")


def test_one_whose_training_is_not_finished(washer, products, tmp_path):
    run = Run(shutil.copytree(washer, tmp_path / "folder") / "washer")
    run.write_manifest(run.manifest().model_copy(update={"status": "training"}))
    refused(products, tmp_path, tmp_path / "folder", "folder/washer: its training is not finished")


@pytest.mark.parametrize("change", ["truncated", "exchanged"])
def test_one_whose_checkpoint_is_not_what_was_trained(washer, products, tmp_path, change):
    run = Run(shutil.copytree(washer, tmp_path / "folder") / "washer")
    if change == "truncated":
        run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:1000])
    else:
        content = torch.load(run.checkpoint, weights_only=False)
        content["epoch"] += 1
        torch.save(content, run.checkpoint)
    refused(products, tmp_path, tmp_path / "folder", "model.ckpt: is not the checkpoint that was trained")


@pytest.mark.parametrize(
    ("name", "model", "data", "message"),
    [
        ("reverse_distillation", {}, {}, "washer was trained with stfpm, unlike the model"),
        ("stfpm", {}, {"image_size": 96}, "washer was trained at 64x64 pixels, unlike"),
        ("stfpm", {"layers": ["layer1", "layer2"]}, {}, "washer has layer1, layer2, layer3 of resnet18, unlike"),
    ],
)
def test_one_of_another_kind(name, model, data, message, washer, products, tmp_path):
    whole = {**of_method(name, specialists=str(washer))["model"], **model}
    refused(products, tmp_path, washer, message, model=whole, data={"categories": ["washer"], **data})


def test_one_that_had_another_teacher(washer, products, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(BUNDLED_FILE)
    name = next(name for name in weights if name.endswith("conv1.weight"))
    save_file({**weights, name: weights[name] * 1.01}, tmp_path / "other.safetensors")
    model = {**of_method("stfpm", specialists=str(washer))["model"], "weights": str(tmp_path / "other.safetensors")}
    refused(products, tmp_path, washer, "washer has a teacher with other weights", model=model)


@pytest.mark.parametrize("name", CLASSES)
def test_they_need_anomalies(name, washer, products, tmp_path):
    options = {"specialists": str(washer), "synthetic_anomalies": 0.0}
    with pytest.raises(UsageError, match="and there are to be none") as error:
        small_run(products, tmp_path / "run", {"model": {"name": name, "backbone": "resnet18", "options": options}})
    assert "synthetic_anomalies" in error.value.hint
    assert not (tmp_path / "run").exists()


def test_batches_that_do_not_say_their_products(washer, monkeypatch):
    model = build(Stfpm, synthetic_anomalies=1.0, specialists=str(washer)).train()
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    batch = batch_of("washer", "screw")
    with pytest.raises(UadxError, match="does not say which products"):
        model.training_step(ImageBatch(image=batch.image, gt_label=batch.gt_label))
    with pytest.raises(UadxError, match="none for 'screw'"):
        model.training_step(batch)


def test_autocast_of_convolutions_changes_nothing():
    """They are converted once, where autocast would do it at each call."""
    specialists, networks = two(Stfpm)
    images = batch_of("nut", "bolt").image

    def ask(student, rows):
        return list(student(images[rows]).values())

    with torch.autocast("cpu", torch.bfloat16):
        expected = [ask(networks[name].student_model, torch.tensor([row])) for row, name in enumerate(("nut", "bolt"))]
        taught = specialists.teach(["nut", "bolt"], images, ask)
    assert taught[0].dtype == torch.bfloat16
    for layer, feature in enumerate(taught):
        assert torch.equal(feature, torch.cat([expected[0][layer], expected[1][layer]]))
    again = specialists.teach(["bolt", "nut"], images, ask)
    assert again[0].dtype == torch.float32


def test_another_precision_is_theirs_too(washer):
    model = build(Stfpm, synthetic_anomalies=1.0, specialists=str(washer)).to(torch.bfloat16).train()
    images = batch_of("washer", "washer").image.to(torch.bfloat16)
    loss = model.loss_with_specialists(images, torch.ones(2, 1, *SIZE), model.specialists, ["washer", "washer"])
    assert loss.isfinite()
