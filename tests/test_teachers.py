"""Teachers of Uninformed Students: distilled once for a recipe, from patches that depend on the step alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TEACHER, over, small_run
from typer.testing import CliRunner
from uadx.app import app

from uad_plugins.artifacts import read_json
from uad_plugins.config import find_config, resolve
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models import UninformedStudents
from uad_plugins.models.uninformed_students import distillation, patches, teachers
from uad_plugins.models.uninformed_students.options import TeacherRecipe
from uad_plugins.models.uninformed_students.procedural import procedural_image, procedural_source
from uad_plugins.models.uninformed_students.teachers import PretrainedFeature, distilled_teacher, load_teacher


@pytest.fixture(scope="module")
def target():
    return PretrainedFeature("resnet18", "bundled")


@pytest.fixture
def pictures(tmp_path, picture):
    for number in range(6):
        picture(tmp_path / "natural" / f"{number}.png", size=(60, 50))
    return tmp_path / "natural"


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


def test_twins_are_shifted_and_changed_in_intensity(tmp_path):
    image = np.random.default_rng(0).integers(20, 200, (60, 50, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "0.png")
    Image.fromarray(image[::-1].copy()).save(tmp_path / "1.png")
    known = [image, image[::-1]]
    first, twins = ((part.permute(0, 2, 3, 1).numpy() * patches.STD + patches.MEAN) * 255 for part in
                    patches.from_folder(tmp_path).batches(17, 8, 0)(0))  # fmt: skip
    shifts, factors = [], []
    windows = [np.lib.stride_tricks.sliding_window_view(each, (17, 17, 3))[:, :, 0].astype(np.float32) for each in known]
    for patch, twin in zip(first, twins, strict=True):
        (place,) = [(i, *at) for i, of in enumerate(windows) for at in np.argwhere((np.abs(of - patch) < 1).all((2, 3, 4)))]
        ratios = twin / windows[place[0]]
        (moved,) = np.argwhere(ratios.std((2, 3, 4)) < 0.01)
        factors.append(ratios[tuple(moved)].mean())
        shifts.append(moved - place[1:])
    assert np.abs(shifts).max() <= 17 // 8
    assert len({tuple(shift) for shift in shifts}) > 3
    assert 0.89 < min(factors) < 0.99
    assert 1.01 < max(factors) < 1.11


@pytest.mark.parametrize("images", [2, 3, 5, 7, 63, 64, 100])
def test_negatives_are_of_other_images(images):
    for seed in range(20):
        chosen = patches.taking_turns(np.random.default_rng(seed), images, 64)
        assert len(chosen) == 64 and chosen.max() < images
        assert (chosen != np.roll(chosen, 1)).all()


def test_the_metric_loss_needs_two_images(tmp_path, picture):
    picture(tmp_path / "only.png", size=(50, 40))
    source = patches.from_folder(tmp_path)
    with pytest.raises(UadxError, match="a single image"):
        source.batches(17, 4, 0)(0)
    assert source.batches(17, 4, 0, twins=False)(0)[0].shape == (4, 3, 17, 17)


def test_images_too_small_for_a_scale_are_found_before_another_is_distilled(tmp_path, picture, monkeypatch):
    picture(tmp_path / "small" / "0.png", size=(20, 20))
    (tmp_path / "small" / "1.png").write_bytes(b"no image")
    monkeypatch.setattr(teachers, "cache_folder", lambda name: tmp_path / name)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(over(teacher=TEACHER)))
    words = ["teacher", "distill", str(tmp_path / "small"), "--weights", "bundled", "--config", str(config)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UadxError)
    assert "no image of at least 33x33 pixels (1 cannot be read)" in done.exception.message
    assert not (tmp_path / "teachers").exists()


def test_a_teacher_from_the_cache_names_the_images_given(pictures, target, tmp_path):
    _, record = distil_again(tmp_path / "cache", target, patches.from_folder(pictures))
    shutil.copytree(pictures, tmp_path / "copied")
    _, again = distil_again(tmp_path / "cache", target, patches.from_folder(tmp_path / "copied"))
    assert again.key == record.key
    assert again.images == f"6 images in {tmp_path / 'copied'}"


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
    assert patches.from_folder(tmp_path).batches(33, 4, 0, twins=False)(0)[0].shape == (4, 3, 33, 33)


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


def test_natural_and_drawn_images_for_the_teacher(products, pictures, tmp_path):
    for images, said in ((str(pictures), "6 images in"), ("procedural", "drawn images")):
        out = tmp_path / said.split()[0]
        small_run(products, out, over(patch_sizes=[17], teacher={**TEACHER, "images": images}))
        (record,) = read_json(out / "run.json")["method"]["teachers"]
        assert said in record["images"]


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
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("teacher")] == ["33x33", "17x17"]
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
        (["--set", "images=elsewhere"], "the images are the argument"),
        (["--set", "knowledge=0", "--set", "compactness=0"], "must be above 0"),
        (["--half"], "--half is of the file"),
        *((["--width", width], "no share of the paper's channels") for width in ("0", "-1", "nan", "5")),
    ],
)
def test_teacher_distill_used_wrongly(pictures, words, message):
    done = CliRunner().invoke(app, ["teacher", "distill", str(pictures), "--weights", "bundled", *words])
    assert isinstance(done.exception, UsageError)
    assert message in done.exception.message
