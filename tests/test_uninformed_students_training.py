"""Uninformed Students trained: teachers, statistics, resuming, and every verb."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import small_config, small_run
from torch.utils.data import DataLoader
from typer.testing import CliRunner
from uadx.app import app

from uad_plugins.artifacts import Run, read_json
from uad_plugins.config import find_config, resolve
from uad_plugins.data.batches import UnifiedBatch
from uad_plugins.data.layouts import scan
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.evaluation.evaluate import evaluate
from uad_plugins.evaluation.predict import predict
from uad_plugins.models import UninformedStudents
from uad_plugins.models.uninformed_students import distillation, patches, teachers
from uad_plugins.models.uninformed_students.options import TeacherRecipe
from uad_plugins.models.uninformed_students.procedural import procedural_image, procedural_source
from uad_plugins.models.uninformed_students.teachers import PretrainedFeature, distilled_teacher, load_teacher

TEACHER = {"steps": 6, "batch_size": 8, "lr": 1e-3}
OPTIONS = {"patch_sizes": [17, 33], "students": 2, "width": 0.0625, "stride": 4, "teacher": TEACHER}
OVER = {
    "model": {"name": "uninformed_students", "options": OPTIONS},
    "data": {"val_fraction": 0.3},
    "optimizer": {"name": "adam", "lr": 1e-3},
}


def over(**changes):
    merged = json.loads(json.dumps(OVER))
    merged["model"]["options"].update(changes)
    return merged


@pytest.fixture(scope="module")
def run(products, tmp_path_factory):
    out = tmp_path_factory.mktemp("students") / "run"
    small_run(products, out, over())
    return out


@pytest.fixture(scope="module")
def target():
    return PretrainedFeature("resnet18", "bundled")


@pytest.fixture
def pictures(tmp_path, picture):
    for number in range(6):
        picture(tmp_path / "natural" / f"{number}.png", size=(60, 50))
    return tmp_path / "natural"


# Teachers


def distil_again(folder, target, source, steps=6, **changes):
    recipe = TeacherRecipe(**{**TEACHER, "steps": steps, **changes})
    return distilled_teacher(recipe, 17, 0.0625, target, source, folder=folder)


def test_a_teacher_is_distilled_once(tmp_path, target, pictures, monkeypatch):
    source = patches.from_folder(pictures)
    first, record = distil_again(tmp_path / "cache", target, source)
    assert record.source == "distilled"
    assert "6 images" in record.images
    monkeypatch.setattr(teachers, "distil", lambda *_, **__: pytest.fail("distilled again"))
    second, again = distil_again(tmp_path / "cache", target, source)
    assert again == record
    images = torch.randn(1, 3, 17, 17)
    assert torch.equal(first(images), second(images))


def test_another_recipe_is_another_teacher(target, pictures, tmp_path, picture):
    source = patches.from_folder(pictures)
    recipe = TeacherRecipe(**TEACHER)

    def key(recipe=recipe, patch_size=17, width=0.0625, source=source, target=target):
        return teachers.teacher_key(recipe, patch_size, width, target, source)

    changes = [("steps", 7), ("lr", 0.1), ("seed", 1), ("target_size", 32)]
    other = [recipe.model_copy(update={name: value}) for name, value in changes]
    weights = PretrainedFeature("resnet18", "bundled")
    weights.record = dataclasses.replace(weights.record, sha256="0" * 64)
    layer = PretrainedFeature("resnet18", "bundled", layer=2)
    same_size = pictures / "0.png"
    content = bytearray(same_size.read_bytes())
    content[len(content) // 2] ^= 1
    same_size.write_bytes(content)
    changed = patches.from_folder(pictures)
    picture(pictures / "more.png", size=(60, 50))
    keys = [key(), *map(key, other), key(patch_size=33), key(width=0.5), key(target=weights), key(target=layer)]
    keys += [key(source=changed), key(source=patches.from_folder(pictures))]
    assert len(set(keys)) == len(keys)
    # The bundled weights end after layer 3: it is the target whichever of the two is asked for.
    deeper = recipe.model_copy(update={"layer": 3})
    assert key(deeper, target=PretrainedFeature("resnet18", "bundled", deeper.layer)) == keys[0]
    # Where the images lie is no part of it.
    shutil.copytree(pictures, tmp_path / "elsewhere")
    assert key(source=patches.from_folder(tmp_path / "elsewhere")) == keys[-1]


def test_a_damaged_cache_is_filled_anew(tmp_path, target, pictures):
    source = patches.from_folder(pictures)
    first, record = distil_again(tmp_path, target, source)
    (tmp_path / f"{record.key}.safetensors").write_bytes(b"damaged")
    second, again = distil_again(tmp_path, target, source)
    assert again == record
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_damaged_checkpoint_is_begun_anew(tmp_path, target, pictures):
    source = patches.from_folder(pictures)
    first, record = distil_again(tmp_path / "whole", target, source)
    torch.save({"step": 3}, tmp_path / "part.ckpt")
    for content in (b"", b"damaged", (tmp_path / "part.ckpt").read_bytes()):
        checkpoint = tmp_path / "broken" / f"{record.key}.ckpt"
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_bytes(content)
        second, again = distil_again(tmp_path / "broken", target, source)
        assert again == record
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert not checkpoint.exists()
        checkpoint.with_suffix(".safetensors").unlink()


def test_an_interrupted_distillation_ends_as_an_unbroken_one(tmp_path, target, pictures, monkeypatch):
    source = patches.from_folder(pictures)
    monkeypatch.setattr(distillation, "CHECKPOINT_EVERY", 2)
    whole, record = distil_again(tmp_path / "whole", target, source)
    assert list((tmp_path / "whole").iterdir()) == [tmp_path / "whole" / f"{record.key}.safetensors"]
    seen, kills = [], [True]

    class Killed(BaseException):
        pass

    class Source(patches.PatchSource):
        def batches(self, *arguments, **more):
            inner = super().batches(*arguments, **more)

            def batch(step):
                seen.append(step)
                # Each is drawn a first time to standardise the target.
                if step == 5 and seen.count(5) == 2 and kills:
                    kills.pop()
                    raise Killed
                return inner(step)

            return batch

    watched = Source(source.images, source.count, source.fingerprint, source.description)
    with pytest.raises(Killed):
        distil_again(tmp_path / "broken", target, watched)
    seen.clear()
    resumed, again = distil_again(tmp_path / "broken", target, watched)
    # 4 and 5 are done again, 0 to 3 are not.
    assert seen == [*range(6), 4, 5]
    assert again.loss == pytest.approx(record.loss)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_distillation_learns(target, tmp_path):
    source = procedural_source()
    source.count = 24
    weights = {"compactness": 0.0}
    _, short = distil_again(tmp_path, target, source, steps=5, **weights)
    _, long = distil_again(tmp_path, target, source, steps=80, **weights)
    assert long.loss < 0.9 * short.loss


def test_a_loss_that_is_no_number_stops(target, tmp_path, pictures):
    with pytest.raises(UadxError, match="the loss became"):
        distil_again(tmp_path, target, patches.from_folder(pictures), steps=40, lr=1e18)
    assert not list(tmp_path.glob("*.safetensors"))


def test_patches_are_crops_and_depend_on_the_step_alone(pictures):
    source = patches.from_folder(pictures)
    batch = source.batches(17, 4, 0)
    first, twins = batch(3)
    assert first.shape == twins.shape == (4, 3, 17, 17)
    batch(9)
    assert torch.equal(batch(3)[0], first)
    assert not torch.equal(batch(4)[0], first)
    assert not torch.equal(source.batches(17, 4, 1)(3)[0], first)
    # Each is found in one of the images.
    known = [np.asarray(Image.open(path)) for path in sorted(pictures.iterdir())]
    pixels = first.permute(0, 2, 3, 1).numpy() * patches.STD + patches.MEAN
    for patch in (pixels * 255).round().astype(np.uint8):
        windows = [np.lib.stride_tricks.sliding_window_view(image, (17, 17, 3))[..., 0, :, :, :] for image in known]
        assert any((window == patch).all(axis=(-3, -2, -1)).any() for window in windows)


def test_patches_of_one_scale_do_not_depend_on_those_of_another(tmp_path, picture):
    picture(tmp_path / "small.png", size=(20, 20))
    picture(tmp_path / "large.png", size=(50, 40))
    picture(tmp_path / "larger.png", size=(60, 50))
    several = patches.from_folder(tmp_path)
    for patch_size, seed in ((17, 0), (33, 0), (17, 0), (17, 1)):
        alone = patches.from_folder(tmp_path).batches(patch_size, 8, seed)(0)
        for mine, other in zip(several.batches(patch_size, 8, seed)(0), alone, strict=True):
            assert torch.equal(mine, other)


def test_without_twins_the_patches_are_the_same(pictures):
    source = patches.from_folder(pictures)
    without = source.batches(17, 4, 0, twins=False)(2)
    assert without[1] is None
    assert torch.equal(without[0], source.batches(17, 4, 0)(2)[0])


def test_twins_are_made_for_the_metric_loss_alone(tmp_path, target, pictures):
    asked = []

    class Source(patches.PatchSource):
        def batches(self, *arguments, twins=True):
            asked.append(twins)
            return super().batches(*arguments, twins=twins)

    known = patches.from_folder(pictures)
    source = Source(known.images, known.count, known.fingerprint, known.description)
    distil_again(tmp_path, target, source)
    distil_again(tmp_path, target, source, metric=1.0)
    assert asked == [False, True]


def test_images_smaller_than_a_patch_are_left_out(tmp_path, picture):
    picture(tmp_path / "small.png", size=(20, 20))
    with pytest.raises(UadxError, match="no image of at least 33x33"):
        patches.from_folder(tmp_path).batches(33, 4, 0)(0)
    picture(tmp_path / "large.png", size=(50, 40))
    assert patches.from_folder(tmp_path).batches(33, 4, 0)(0)[0].shape == (4, 3, 33, 33)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UadxError, match="no image in it"):
        patches.from_folder(tmp_path)
    with pytest.raises(UadxError, match="no such folder"):
        patches.from_folder(tmp_path / "nowhere")


def test_drawn_images_are_the_same_every_time_and_differ():
    first, second = procedural_image(1), procedural_image(2)
    assert first.shape == (192, 192, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, procedural_image(1))
    assert np.abs(first.astype(int) - second).mean() > 5
    assert first.std() > 5


def test_a_file_that_is_no_teacher(tmp_path):
    (tmp_path / "wrong.safetensors").write_bytes(b"no")
    with pytest.raises(UadxError, match="not a teacher"):
        load_teacher(tmp_path / "wrong.safetensors")


def test_the_teacher_that_ships(monkeypatch):
    found = teachers.bundled_teacher(33, 0.5)
    assert found is not None
    network, record = found
    assert (record.source, record.patch_size, record.width) == ("bundled", 33, 0.5)
    assert "drawn images" in record.images
    # It tells patches apart, in many dimensions.
    descriptors = network(procedural_source().batches(33, 64, 9)(0)[0])[:, 0]
    spread = torch.linalg.eigvalsh(torch.corrcoef(descriptors.T))
    assert float(spread.sum() ** 2 / spread.square().sum()) > 10
    assert teachers.bundled_teacher(33, 0.25) is None
    # Nothing is distilled and no backbone is loaded where it serves.
    monkeypatch.setattr("uad_plugins.models.uninformed_students.lightning_model.PretrainedFeature", None)
    model = UninformedStudents(weights="bundled", patch_sizes=[33], width=0.5, stride=4)
    assert [r["source"] for r in model.teacher_records] == ["bundled"]
    patches_ = torch.randn(2, 3, 33, 33)
    assert torch.allclose(model.model.teachers[0](patches_), network(patches_), atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [{"steps": 6}, {"images": "normal"}, {"images": "procedural"}, {"metric": 1.0}, {"seed": 1}, {"target_size": 0}],
)
def test_the_teacher_that_ships_does_not_stand_in_for_another_recipe(change):
    shipped = {"weights": "bundled", "patch_sizes": [33], "width": 0.5, "stride": 4}
    edge = resolve(file=find_config(Path("uninformed_students_edge")), environment={}).model.options["teacher"]
    for recipe in ({}, edge):
        assert UninformedStudents(**shipped, teacher=recipe).teacher_records[0]["source"] == "bundled"
        if recipe.get(next(iter(change))) != next(iter(change.values())):
            model = UninformedStudents(**shipped, teacher={**recipe, **change})
            assert model.teacher_records == []
            # Distilled from the network that ships, as asked.
            assert model.weights_record.source == "bundled"


# Runs


def test_a_run_records_its_teachers_and_finishes(run):
    manifest = Run.open(run).manifest()
    assert [(t["patch_size"], t["source"]) for t in manifest.method["teachers"]] == [(17, "distilled"), (33, "distilled")]
    assert "normal training images at 64x64" in manifest.method["teachers"][0]["images"]
    assert manifest.weights["source"] == "bundled"


def test_thresholds_are_not_set_by_the_ratio_of_scores(run, products, tmp_path):
    assert {entry["how"] for entry in read_json(run / "thresholds.json")["categories"].values()} == {"normal"}
    shutil.copytree(run, tmp_path / "run")
    done = CliRunner().invoke(app, ["thresholds", str(tmp_path / "run"), str(products), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["categories"] == read_json(run / "thresholds.json")["categories"]


def test_statistics_come_from_the_parts_they_should(run, products):
    with open_detector(run) as detector:
        model = detector.model
        table = small_datamodule(products).index()
        teacher = model.model.teachers[0]
        parts = {}
        for split in ("train", "val"):
            paths = [table.paths[int(i)] for i in table.where(split=split)]
            pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
            parts[split] = model.pre_processor(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        with torch.no_grad():
            descriptors = teacher.dense(parts["train"])[:, 0].transpose(0, 1).flatten(1)
            assert torch.allclose(model.model.feature_mean[0, 0], descriptors.mean(1), rtol=1e-3, atol=1e-5)
            assert torch.allclose(model.model.feature_std[0, 0], descriptors.std(1, unbiased=False), rtol=1e-3)
            found = model.model.deviations(parts["val"])
        for kind, values in enumerate((found.errors, found.variances)):
            for scale in range(2):
                assert model.model.score_mean[scale, 0, kind] == pytest.approx(values[:, scale].mean().item(), rel=1e-3)
                std = values[:, scale].std(unbiased=False).item()
                assert model.model.score_std[scale, 0, kind] == pytest.approx(std, rel=1e-3)


def small_datamodule(root):
    from uad_plugins.data.datamodule import UnifiedDataModule

    return UnifiedDataModule(str(root), image_size=64, val_fraction=0.3, num_workers=0)


def test_only_the_students_learn(run):
    first = torch.load(run / "model.ckpt", weights_only=True)["state_dict"]
    loaded = UninformedStudents.load_from_checkpoint(run / "model.ckpt", map_location="cpu")
    trained = {id(p) for p in loaded.trained_parameters() if p.requires_grad}
    names = {name.split(".")[1] for name, p in loaded.named_parameters() if id(p) in trained}
    assert names == {"students"}
    record = Run.open(run).manifest().method["teachers"][0]
    cached, _ = load_teacher(teachers.cache_folder("teachers") / f"{record['key']}.safetensors")
    for name, tensor in cached.state_dict().items():
        assert torch.equal(first[f"model.teachers.0.{name}"], tensor)


def test_evaluate_and_predict(run, products, tmp_path):
    with open_detector(run) as detector:
        report = evaluate(detector, scan(products), out=tmp_path / "evaluation").report
        assert set(report["categories"]) == set(detector.categories)
        assert all(0 <= values["image_auroc"] <= 1 for values in report["categories"].values())
        paths = sorted(str(path) for path in (products / "washer" / "test").rglob("*.png"))
        rows = list(predict(detector, paths, category="washer", out=tmp_path / "maps"))
    assert all(np.isfinite(row["score"]) for row in rows)
    with (tmp_path / "evaluation" / "scores.csv").open() as file:
        scored = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}
    assert {round(row["score"], 5) for row in rows} <= {round(score, 5) for score in scored.values()}


def test_a_run_is_evaluated_in_batches_of_its_configuration(products, run, tmp_path):
    for recipe in ("uninformed_students", "uninformed_students_edge"):
        assert resolve(file=find_config(Path(recipe)), environment={}).data.eval_batch_size <= 8
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    content, changed = re.subn(r"eval_batch_size: \d+", "eval_batch_size: 3", config.read_text())
    assert changed == 1
    config.write_text(content)
    paths = sorted(str(path) for path in (products / "washer" / "test").rglob("*.png"))
    seen = []
    with open_detector(tmp_path / "run") as detector, open_detector(run) as whole:
        detector.model.model.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
        found = list(detector.stream(paths))
        for mine, other in zip(found, whole.stream(paths), strict=True):
            assert mine.score == pytest.approx(other.score, rel=1e-4)
            assert np.allclose(mine.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-3)
    assert seen == [3, 3, 2]


def test_the_same_seed_gives_the_same_scores(run, products, tmp_path):
    small_run(products, tmp_path / "again", over())
    paths = sorted(str(path) for path in (products / "washer" / "test").rglob("*.png"))
    with open_detector(run) as one, open_detector(tmp_path / "again") as two:
        assert [p.score for p in one.stream(paths)] == [p.score for p in two.stream(paths)]


def test_resumed_training_ends_as_an_unbroken_one(run, products, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    whole = UninformedStudents.training_step

    def killed(self, batch, *more, **named):
        if self.trainer.current_epoch == 1:
            raise Killed
        return whole(self, batch, *more, **named)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(UninformedStudents, "training_step", killed)
        with pytest.raises(Killed):
            small_run(products, out, over())
    # The teachers come from the checkpoint: neither cache nor distillation is needed.
    with monkeypatch.context() as patched:
        patched.setattr(UninformedStudents, "_distil", lambda *_: pytest.fail("distilled again"))
        small_run(products, out, over(), resume=True)
    assert Run.open(out).manifest().method == Run.open(run).manifest().method
    paths = sorted(str(path) for path in (products / "connector" / "test").rglob("*.png"))[:4]
    with open_detector(run) as one, open_detector(out) as two:
        assert [p.score for p in two.stream(paths)] == pytest.approx([p.score for p in one.stream(paths)], rel=1e-5)


def test_statistics_by_category(products, tmp_path):
    small_run(products, tmp_path / "run", over(statistics="category", patch_sizes=[17]))
    path = str(next((products / "washer" / "test").rglob("*.png")))
    with open_detector(tmp_path / "run") as detector:
        assert detector.model.model.score_mean.shape == (1, 3, 2)
        assert not torch.allclose(detector.model.model.feature_mean[0, 0], detector.model.model.feature_mean[0, 1])
        evaluate(detector, scan(products))
        row = next(predict(detector, [path], category="washer"))
        other = next(predict(detector, [path], category="connector"))
        assert row["score"] != other["score"]
        with pytest.raises(UadxError, match="each image needs its category"):
            next(predict(detector, [path]))


def test_worker_processes_change_nothing(run, products, tmp_path):
    """Statistics of a pass of their own: the trainer's loader keeps its batches, with persistent workers too."""
    metrics = small_run(products, tmp_path / "run", over() | {"data": {**OVER["data"], "num_workers": 1}})
    known = read_json(run / "metrics.json")
    assert metrics["best_val_loss"] == pytest.approx(known["best_val_loss"], rel=1e-5)
    with open_detector(run) as one, open_detector(tmp_path / "run") as two:
        for name in ("score_mean", "score_std", "feature_mean", "feature_std"):
            assert torch.allclose(getattr(two.model.model, name), getattr(one.model.model, name), rtol=1e-4)


def test_statistics_of_descriptors_do_not_depend_on_the_sampling(run, products, tmp_path):
    data = {**OVER["data"], "sampling": "balanced", "samples_per_epoch": 5}
    small_run(products, tmp_path / "run", over() | {"data": data, "trainer": {"max_epochs": 1}})
    with open_detector(run) as one, open_detector(tmp_path / "run") as two:
        for name in ("feature_mean", "feature_std"):
            assert torch.allclose(getattr(two.model.model, name), getattr(one.model.model, name), rtol=1e-5)


def test_natural_and_drawn_images_for_the_teacher(products, pictures, tmp_path):
    for images, said in ((str(pictures), "6 images in"), ("procedural", "drawn images")):
        out = tmp_path / said.split()[0]
        small_run(products, out, over(patch_sizes=[17], teacher={**TEACHER, "images": images}))
        (record,) = read_json(out / "run.json")["method"]["teachers"]
        assert said in record["images"]


def test_anomalibs_engine_trains_and_tests_it(products, tmp_path):
    from anomalib.engine import Engine

    data = small_datamodule(products)
    model = UninformedStudents(
        weights="bundled",
        **OPTIONS,
        pre_processor=UninformedStudents.configure_pre_processor((64, 64)),
        visualizer=False,
    )
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False)
    engine.fit(model, datamodule=data)
    (figures,) = engine.test(model, datamodule=data)
    assert 0 <= figures["image_AUROC"] <= 1
    assert model.model.normalised


def test_it_trains_on_a_datamodule_of_anomalibs_own(products, tmp_path):
    from anomalib.data import Folder
    from anomalib.engine import Engine

    data = Folder(
        name="washer",
        root=products / "washer",
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/bent",
        mask_dir="ground_truth/bent",
        train_batch_size=4,
        num_workers=0,
    )
    model = UninformedStudents(
        weights="bundled",
        **{**OPTIONS, "patch_sizes": [17]},
        pre_processor=UninformedStudents.configure_pre_processor((64, 64)),
        visualizer=False,
    )
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False)
    engine.fit(model, datamodule=data)
    (figures,) = engine.test(model, datamodule=data)
    assert 0 <= figures["image_AUROC"] <= 1
    assert "10 normal training images at 64x64" in model.teacher_records[0]["images"]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("validated", ["its own loader", "no loader", "no batches", "no normal image"])
def test_it_trains_on_loaders_without_a_datamodule(products, tmp_path, validated):
    from anomalib.engine import Engine

    data = small_datamodule(products)
    data.setup()
    model = UninformedStudents(
        weights="bundled",
        **{**OPTIONS, "patch_sizes": [17]},
        pre_processor=UninformedStudents.configure_pre_processor((64, 64)),
        visualizer=False,
    )
    held_out = data.val_dataloader()
    if validated == "no normal image":
        marked = list(held_out)
        for batch in marked:
            batch.gt_label = torch.ones_like(batch.gt_label)
        held_out = DataLoader(marked, batch_size=None)
    limit = {"limit_val_batches": 0} if validated == "no batches" else {}
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False, **limit)
    loaders = [data.train_dataloader()] + ([held_out] if validated != "no loader" else [])
    if validated == "its own loader":
        engine.fit(model, *loaders)
    else:
        with pytest.warns(UserWarning, match="no normal image is held out: .* come from the training images"):
            engine.fit(model, *loaders)
    part = data.val_data if validated == "its own loader" else data.train_data
    images = model.pre_processor(part.collate_fn([part[i] for i in range(len(part))]).image)
    with torch.no_grad():
        found = model.model.deviations(images)
    expected = torch.stack([found.errors.mean(), found.variances.mean()])
    assert torch.allclose(model.model.score_mean[0, 0], expected, rtol=1e-3)
    # The post-processor has seen maps of these statistics.
    if validated == "its own loader":
        assert float(model.post_processor.image_threshold) <= float(model.model(images).pred_score.max()) + 1e-3
        assert "normal training images" in model.teacher_records[0]["images"]


def test_training_images_whose_files_are_not_known(tmp_path):
    from lightning.pytorch import Trainer

    item = UnifiedBatch(image=torch.rand(1, 3, 64, 64), gt_label=torch.zeros(1, dtype=torch.long))
    model = UninformedStudents(weights="bundled", **{**OPTIONS, "patch_sizes": [17]}, visualizer=False)
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UadxError) as caught:
        trainer.fit(model, DataLoader([item], batch_size=None), DataLoader([item], batch_size=None))
    assert (
        caught.value.message
        == "the files of the training images are not known: their data set is neither of uadx nor of anomalib"
    )


def test_training_at_an_output_stride_of_its_own_reaches_every_pixel(monkeypatch):
    torch.manual_seed(0)
    model = UninformedStudents(weights="bundled", **{**OPTIONS, "train_stride": 4, "patch_sizes": [17]})
    model.model.feature_std.fill_(1.0)
    model.log = lambda *_, **__: None
    seen = []
    inner = model.model.losses
    model.model.losses = lambda *given: seen.append(given[-1]) or inner(*given)
    # Error and variance are no part of a training step.
    model.model.deviations = None
    batch = UnifiedBatch(image=torch.rand(1, 3, 64, 64), gt_label=torch.zeros(1, dtype=torch.long))
    monkeypatch.setattr(UninformedStudents, "global_step", property(lambda _: len(seen)))
    for _ in range(16):
        loss = model.training_step(batch)["loss"]
    assert torch.isfinite(loss)
    assert set(seen) == {(down, right) for down in range(4) for right in range(4)}


def test_the_held_out_loss_of_an_image_is_its_training_loss(run):
    model = UninformedStudents.load_from_checkpoint(run / "model.ckpt", map_location="cpu").eval()
    batch = UnifiedBatch(image=torch.rand(3, 3, 64, 64), gt_label=torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        predicted = model.validation_step(batch)
        each = [model.model.deviations(image[None]).losses.mean() for image in torch.as_tensor(batch.image)]
        whole = model.model(torch.as_tensor(batch.image))
    assert torch.allclose(model.held_out_loss, torch.stack(each), rtol=1e-4)
    assert torch.allclose(torch.as_tensor(predicted.anomaly_map).squeeze(), whole.anomaly_map.squeeze(), atol=1e-4)


# What a user can do wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_sizes": [17, 31]}, "model.options.patch_sizes"),
        ({"patch_sizes": []}, "model.options.patch_sizes"),
        ({"patch_sizes": [17, 17]}, "each patch size may be given once"),
        ({"students": 0}, "model.options.students"),
        ({"stride": 3}, "model.options.stride"),
        ({"statistics": "each"}, "model.options.statistics"),
        ({"teacher": {"step": 5}}, "model.options.teacher.step"),
        ({"dropout": 0.1}, "model.options.dropout"),
    ],
)
def test_options_are_checked(options, message):
    changed = json.loads(json.dumps(OVER))
    changed["model"]["options"] = options
    with pytest.raises(UsageError, match=message):
        small_config(changed)


def test_images_smaller_than_the_largest_patch(products, tmp_path):
    with pytest.raises(UsageError, match="patches of 65x65 pixels cannot take images of 64"):
        small_run(products, tmp_path / "run", over(patch_sizes=[65]))


def test_teacher_distill_fills_the_cache_and_writes_a_file(pictures, tmp_path):
    words = ["teacher", "distill", str(pictures), "--patch-size", "17", "--width", "0.0625", "--weights", "bundled"]
    words += ["--set", "steps=4", "--set", "batch_size=8", "--json"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "teacher.safetensors"), "--half"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["steps"] == 4
    assert (teachers.cache_folder("teachers") / f"{record['key']}.safetensors").is_file()
    half, same = load_teacher(tmp_path / "teacher.safetensors")
    assert same.key == record["key"]
    assert half(torch.randn(1, 3, 17, 17)).shape == (1, 1, 128)


def test_teacher_distill_makes_what_a_training_with_the_same_configuration_looks_up(
    pictures, products, tmp_path, monkeypatch
):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(over(teacher={**TEACHER, "steps": 5, "seed": 7})))
    words = ["--weights", "bundled", "--config", str(config)]
    done = CliRunner().invoke(app, ["teacher", "distill", str(pictures), *words])
    assert done.exit_code == 0, done.output
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("teacher")] == ["17x17", "33x33"]
    monkeypatch.setattr(teachers, "distil", lambda *_, **__: pytest.fail("distilled again"))
    changes = ["data.image_size=64", "data.num_workers=0", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    words += ["--set", f"model.options.teacher.images={pictures}", *changes]
    done = CliRunner().invoke(app, ["train", str(products), "--out", str(tmp_path / "run"), *words])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "stfpm_short"], "a configuration of stfpm, which has no such teacher"),
        (["--config", "uninformed_students", "--out", "teacher.safetensors"], "--out takes one teacher"),
        (["--patch-size", "18"], "there is no such patch network"),
        (["--set", "step=4"], "--set step"),
        (["--set", "steps=none"], "--set steps"),
    ],
)
def test_teacher_distill_used_wrongly(pictures, words, message):
    done = CliRunner().invoke(app, ["teacher", "distill", str(pictures), "--weights", "bundled", *words])
    assert isinstance(done.exception, UsageError)
    assert message in done.exception.message
