"""Uninformed Students trained by anomalib's engine: on datamodules of uadx and its own, and on loaders alone."""

import pytest
import torch
from runs import OPTIONS, small_datamodule
from torch.utils.data import DataLoader

from uad_plugins.data.batches import UnifiedBatch
from uad_plugins.errors import UadxError
from uad_plugins.models import UninformedStudents


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


def engine(folder):
    from anomalib.engine import Engine

    return Engine(default_root_dir=folder, max_epochs=1, accelerator="cpu", devices=1, logger=False)


def small_model(**options):
    processor = UninformedStudents.configure_pre_processor((64, 64))
    settings = {**OPTIONS, "patch_sizes": [17], **options}
    return UninformedStudents(weights="bundled", **settings, pre_processor=processor, visualizer=False)


@pytest.mark.parametrize("statistics", ["global", "category"])
def test_trained_again_on_other_products_it_takes_their_statistics(products, tmp_path, statistics):
    again, fresh = small_model(statistics=statistics), small_model(statistics=statistics)
    first, *others = small_datamodule(products).index().categories
    engine(tmp_path / "a").fit(again, datamodule=small_datamodule(products, categories=[first]))
    fresh.model.teachers.load_state_dict(again.model.teachers.state_dict())
    fresh._missing = []
    for model in (again, fresh):
        engine(tmp_path / "b").fit(model, datamodule=small_datamodule(products, categories=others))
    assert again.categories == ([] if statistics == "global" else sorted(others))
    assert torch.allclose(again.model.feature_mean, fresh.model.feature_mean, rtol=1e-4)
    assert torch.allclose(again.model.feature_std, fresh.model.feature_std, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_statistics_by_category_need_the_category_of_an_image(products, tmp_path):
    model = small_model(statistics="category")
    trainer = engine(tmp_path)
    trainer.fit(model, datamodule=small_datamodule(products))
    with pytest.raises(UadxError, match="images whose category is not known"):
        trainer.predict(model, data_path=next((products / "washer" / "test" / "good").iterdir()))


def test_images_smaller_than_a_patch_are_refused_before_a_teacher_is_distilled(products, tmp_path, monkeypatch):
    model = small_model(patch_sizes=[17, 65])
    monkeypatch.setattr(model, "_distil", lambda: pytest.fail("distilled"))
    with pytest.raises(UadxError, match="patches of 65x65 pixels are larger than images of 64"):
        engine(tmp_path).fit(model, datamodule=small_datamodule(products))


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
