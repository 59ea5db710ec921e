"""Uninformed Students trained: statistics, resuming, and every verb."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import OPTIONS, OVER, over, small_config, small_datamodule, small_run
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
from uad_plugins.models.uninformed_students import teachers
from uad_plugins.models.uninformed_students.networks import PatchNetwork, multiply_accumulates
from uad_plugins.models.uninformed_students.options import UninformedStudentsOptions
from uad_plugins.models.uninformed_students.teachers import load_teacher


def test_a_run_records_its_teachers_and_finishes(students):
    manifest = Run.open(students).manifest()
    assert [(t["patch_size"], t["source"]) for t in manifest.method["teachers"]] == [(17, "distilled"), (33, "distilled")]
    assert "normal training images at 64x64" in manifest.method["teachers"][0]["images"]
    assert manifest.weights["source"] == "bundled"


def test_thresholds_are_not_set_by_the_ratio_of_scores(students, products, tmp_path):
    assert {entry["how"] for entry in read_json(students / "thresholds.json")["categories"].values()} == {"normal"}
    shutil.copytree(students, tmp_path / "run")
    done = CliRunner().invoke(app, ["thresholds", str(tmp_path / "run"), str(products), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["categories"] == read_json(students / "thresholds.json")["categories"]


def test_statistics_come_from_the_parts_they_should(students, products):
    with open_detector(students) as detector:
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


def test_only_the_students_learn(students):
    first = torch.load(students / "model.ckpt", weights_only=True)["state_dict"]
    loaded = UninformedStudents.load_from_checkpoint(students / "model.ckpt", map_location="cpu")
    trained = {id(p) for p in loaded.trained_parameters() if p.requires_grad}
    names = {name.split(".")[1] for name, p in loaded.named_parameters() if id(p) in trained}
    assert names == {"students"}
    record = Run.open(students).manifest().method["teachers"][0]
    cached, _ = load_teacher(teachers.cache_folder("teachers") / f"{record['key']}.safetensors")
    for name, tensor in cached.state_dict().items():
        assert torch.equal(first[f"model.teachers.0.{name}"], tensor)


def test_evaluate_and_predict(students, products, tmp_path):
    with open_detector(students) as detector:
        report = evaluate(detector, scan(products), out=tmp_path / "evaluation").report
        assert set(report["categories"]) == set(detector.categories)
        assert all(0 <= values["image_auroc"] <= 1 for values in report["categories"].values())
        paths = sorted(str(path) for path in (products / "washer" / "test").rglob("*.png"))
        rows = list(predict(detector, paths, category="washer", out=tmp_path / "maps"))
    assert all(np.isfinite(row["score"]) for row in rows)
    with (tmp_path / "evaluation" / "scores.csv").open() as file:
        scored = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}
    assert {round(row["score"], 5) for row in rows} <= {round(score, 5) for score in scored.values()}


def test_a_run_is_evaluated_in_batches_of_its_configuration(products, students, tmp_path):
    for recipe in ("uninformed_students", "uninformed_students_edge"):
        assert resolve(file=find_config(Path(recipe)), environment={}).data.eval_batch_size <= 8
    shutil.copytree(students, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    content, changed = re.subn(r"eval_batch_size: \d+", "eval_batch_size: 3", config.read_text())
    assert changed == 1
    config.write_text(content)
    paths = sorted(str(path) for path in (products / "washer" / "test").rglob("*.png"))
    seen = []
    with open_detector(tmp_path / "run") as detector, open_detector(students) as whole:
        detector.model.model.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
        found = list(detector.stream(paths))
        for mine, other in zip(found, whole.stream(paths), strict=True):
            assert mine.score == pytest.approx(other.score, rel=1e-4)
            assert np.allclose(mine.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-3)
    assert seen == [3, 3, 2]


def test_the_same_seed_gives_the_same_scores(students, products, tmp_path):
    small_run(products, tmp_path / "again", over())
    paths = sorted(str(path) for path in (products / "washer" / "test").rglob("*.png"))
    with open_detector(students) as one, open_detector(tmp_path / "again") as two:
        assert [p.score for p in one.stream(paths)] == [p.score for p in two.stream(paths)]


def test_resumed_training_ends_as_an_unbroken_one(students, products, tmp_path, monkeypatch):
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
    assert Run.open(out).manifest().method == Run.open(students).manifest().method
    paths = sorted(str(path) for path in (products / "connector" / "test").rglob("*.png"))[:4]
    with open_detector(students) as one, open_detector(out) as two:
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


def test_worker_processes_change_nothing(students, products, tmp_path):
    """Statistics of a pass of their own: the trainer's loader keeps its batches, with persistent workers too."""
    metrics = small_run(products, tmp_path / "run", over() | {"data": {**OVER["data"], "num_workers": 1}})
    known = read_json(students / "metrics.json")
    assert metrics["best_val_loss"] == pytest.approx(known["best_val_loss"], rel=1e-5)
    with open_detector(students) as one, open_detector(tmp_path / "run") as two:
        for name in ("score_mean", "score_std", "feature_mean", "feature_std"):
            assert torch.allclose(getattr(two.model.model, name), getattr(one.model.model, name), rtol=1e-4)


def test_statistics_of_descriptors_do_not_depend_on_the_sampling(students, products, tmp_path):
    data = {**OVER["data"], "sampling": "balanced", "samples_per_epoch": 5}
    small_run(products, tmp_path / "run", over() | {"data": data, "trainer": {"max_epochs": 1}})
    with open_detector(students) as one, open_detector(tmp_path / "run") as two:
        for name in ("feature_mean", "feature_std"):
            assert torch.allclose(getattr(two.model.model, name), getattr(one.model.model, name), rtol=1e-5)


def test_training_at_an_output_stride_and_window_of_its_own_reaches_every_pixel(monkeypatch):
    torch.manual_seed(0)
    options = {**OPTIONS, "train_stride": 2, "train_window": 32, "patch_sizes": [17]}
    model = UninformedStudents(weights="bundled", **options)
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
    assert {(grid.stride, *grid.offset, *grid.window) for grid in seen} == {
        (2, down, right, top, left, 16, 16) for down in range(2) for right in range(2) for top in (0, 16) for left in (0, 16)
    }


def test_the_held_out_loss_of_an_image_is_its_training_loss(students):
    model = UninformedStudents.load_from_checkpoint(students / "model.ckpt", map_location="cpu").eval()
    batch = UnifiedBatch(image=torch.rand(3, 3, 64, 64), gt_label=torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        predicted = model.validation_step(batch)
        each = [model.model.deviations(image[None]).losses.mean() for image in torch.as_tensor(batch.image)]
        whole = model.model(torch.as_tensor(batch.image))
    assert torch.allclose(model.held_out_loss, torch.stack(each), rtol=1e-4)
    assert torch.allclose(torch.as_tensor(predicted.anomaly_map).squeeze(), whole.anomaly_map.squeeze(), atol=1e-4)


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


def test_the_recipe_that_ships_is_the_papers():
    """Sections 4.1 and 4.2 of arXiv 1911.02357, the epochs and the batch of arXiv 2407.02968."""
    config = resolve(file=find_config(Path("uninformed_students")), environment={})
    options = UninformedStudentsOptions.model_validate(config.model.options)
    assert (options.patch_sizes, options.students, options.width, options.stride) == ([17, 33, 65], 3, 1.0, 1)
    assert (options.train_stride, options.train_window, options.statistics) == (None, None, "global")
    teacher = options.teacher
    assert (teacher.steps, teacher.batch_size, teacher.lr, teacher.weight_decay) == (50_000, 64, 2e-4, 1e-5)
    assert (teacher.knowledge, teacher.metric, teacher.compactness) == (1.0, 0.0, 1.0)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.schedule) == ("adam", 1e-4, 1e-5, "constant")
    assert (config.data.image_size, config.data.train_batch_size, config.trainer["max_epochs"]) == (256, 1, 150)


def cost(patch_sizes, width, stride):
    """GMAC of an image of 256 x 256 pixels, and millions of parameters."""
    networks = [PatchNetwork(size, copies, width, stride) for size in patch_sizes for copies in (1, 3)]
    gmac = sum(multiply_accumulates(network, (256, 256)) for network in networks) / 1e9
    return gmac, sum(p.numel() for network in networks for p in network.parameters()) / 1e6


def test_the_page_says_what_each_recipe_costs():
    page = (Path(__file__).parents[1] / "docs" / "uninformed_students.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.endswith(" M |")]
    assert len(rows) == 5
    for name, patch_sizes, _, channels, stride, gmac, parameters in rows:
        found = cost([int(size) for size in patch_sizes.split(",")], {"all": 1.0, "half": 0.5}[channels], int(stride))
        assert (round(found[0]), round(found[1], 1)) == (int(gmac), float(parameters.split()[0])), name
    dense, edge = (
        resolve(file=find_config(Path(name)), environment={}).model.options
        for name in ("uninformed_students", "uninformed_students_edge")
    )
    costs = [cost(each["patch_sizes"], each["width"], each["stride"])[0] for each in (dense, edge)]
    assert [round(each) for each in costs] == [int(rows[0][5]), int(rows[-1][5])]
    assert costs[0] >= 20 * costs[1]
