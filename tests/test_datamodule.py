"""The unified datamodule: the category travels with every sample, the three parts share none, masks are never made up."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from uad_plugins.data.batches import NumpyUnifiedBatch, NumpyUnifiedItem, UnifiedBatch, UnifiedItem
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.data.pixel_cache import PixelCache
from uad_plugins.data.samples import held_out_of
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.imaging import read_mask, read_rgb, resize_mask, resize_rgb


def module_of(root, stage="fit", **options):
    options = {"image_size": 32, "train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "seed": 0, **options}
    module = UnifiedDataModule(str(root), **options)
    module.setup(stage)
    return module


@pytest.fixture(scope="module")
def module(products):
    return module_of(products)


@pytest.fixture
def mixed(tmp_path, mvtec, mask):
    """A category with masks, of which one defective image lacks its own, and one without any."""
    mvtec(tmp_path, "bolt", train=5, good=3, bad=5)
    mvtec(tmp_path, "nut", train=6, good=2, bad=3, masks=False)
    (tmp_path / "bolt/ground_truth/crack/002_mask.png").unlink()
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def items(category_of, mask=True):
    return [
        UnifiedItem(
            image=torch.full((3, 4, 4), index / 10),
            gt_label=torch.tensor(index % 2),
            gt_mask=torch.zeros(4, 4, dtype=torch.uint8) + index % 2 if mask else None,
            image_path=f"{index}.png",
            category=name,
            category_index=torch.tensor(number),
        )
        for index, (name, number) in enumerate(category_of)
    ]


CATEGORIES = [("bolt", 0), ("nut", 1), ("bolt", 0)]


def test_categories_travel_through_collate_and_back():
    batch = UnifiedBatch.collate(items(CATEGORIES))
    assert type(batch) is UnifiedBatch
    assert batch.category == ["bolt", "nut", "bolt"]
    assert (batch.category_index.tolist(), batch.category_index.dtype) == ([0, 1, 0], torch.int64)
    assert (batch.gt_label.tolist(), batch.gt_mask.shape, batch.image.shape) == ([0, 1, 0], (3, 4, 4), (3, 3, 4, 4))
    assert batch.image_path == ["0.png", "1.png", "2.png"]
    assert batch.batch_size == len(batch) == 3
    single = list(batch)
    assert [(type(i), i.category, int(i.category_index), int(i.gt_label)) for i in single] == [
        (UnifiedItem, "bolt", 0, 0),
        (UnifiedItem, "nut", 1, 1),
        (UnifiedItem, "bolt", 0, 0),
    ]
    torch.testing.assert_close(single[2].image, batch.image[2])


def test_categories_travel_to_numpy():
    batch = UnifiedBatch.collate(items(CATEGORIES)).to_numpy()
    assert type(batch) is NumpyUnifiedBatch
    assert batch.category == ["bolt", "nut", "bolt"]
    assert isinstance(batch.category_index, np.ndarray)
    assert batch.category_index.tolist() == [0, 1, 0]
    single = items(CATEGORIES)[1].to_numpy()
    assert (type(single), single.category, int(single.category_index)) == (NumpyUnifiedItem, "nut", 1)


def test_categories_survive_an_update_with_predictions():
    batch = UnifiedBatch.collate(items(CATEGORIES)).update(pred_score=torch.tensor([0.1, 0.9, 0.2]))
    assert (batch.category, batch.category_index.tolist()) == (["bolt", "nut", "bolt"], [0, 1, 0])
    assert [round(float(item.pred_score), 1) for item in batch] == [0.1, 0.9, 0.2]


def test_a_batch_has_masks_only_when_every_item_has_one():
    assert UnifiedBatch.collate(items(CATEGORIES, mask=False)).gt_mask is None
    assert UnifiedBatch.collate([*items(CATEGORIES), *items(CATEGORIES, mask=False)]).gt_mask is None


def test_the_three_parts_are_disjoint_and_complete(module):
    parts = [set(part.samples["image_path"]) for part in (module.train_data, module.val_data, module.test_data)]
    assert [len(part) for part in parts] == [27, 3, 24]
    assert set.union(*parts) == set(module.table.paths)
    assert sum(map(len, parts)) == len(module.table)
    assert set(module.train_data.samples["label_index"]) | set(module.val_data.samples["label_index"]) == {0}
    assert module.categories == ["connector", "fabric", "washer"]


def test_every_loader_gives_each_image_of_its_part_once_with_its_category(module):
    loaders = {"train": module.train_dataloader(), "val": module.val_dataloader(), "test": module.test_dataloader()}
    for split, loader in loaders.items():
        seen = {}
        for batch in loader:
            assert type(batch) is UnifiedBatch
            assert len(batch) <= 4
            assert [module.categories[i] for i in batch.category_index] == batch.category
            seen.update(zip(batch.image_path, zip(batch.category, batch.gt_label.tolist(), strict=True), strict=True))
        expected = [module.table[int(index)] for index in module.table.where(split=split)]
        assert seen == {sample.path: (sample.category, sample.label) for sample in expected}


@pytest.mark.parametrize("size", [32, (24, 40)])
def test_pixels_are_those_of_the_file_at_the_size_asked_for(products, size):
    module = module_of(products, image_size=size, categories=["washer"])
    shape = (32, 32) if size == 32 else size
    sample = next(item for item in module.test_data if int(item.gt_label))
    expected = resize_rgb(read_rgb(sample.image_path), shape)
    np.testing.assert_array_equal((sample.image * 255).round().permute(1, 2, 0).numpy(), expected)
    np.testing.assert_array_equal(sample.gt_mask.numpy().astype(bool), resize_mask(read_mask(sample.mask_path), shape))


def test_without_a_size_or_a_model_images_have_256_pixels_a_side(products):
    assert module_of(products, image_size=None).train_data[0].image.shape == (3, 256, 256)


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_never_reads_masks(module, split):
    dataset = getattr(module, f"{split}_data")
    assert {dataset[index].gt_mask for index in range(len(dataset))} == {None}
    assert dataset.task.value == "classification"


def test_test_batches_never_mix_masked_and_unmasked_samples(mixed):
    module = module_of(mixed, eval_batch_size=3)
    batches = list(module.test_dataloader())
    names = [[path.removeprefix(f"{mixed}/") for path in batch.image_path] for batch in batches]
    with_masks = [batch.gt_mask is not None for batch in batches]
    assert list(zip(with_masks, names, strict=True)) == [
        (True, ["bolt/test/crack/000.png", "bolt/test/crack/001.png"]),
        (False, ["bolt/test/crack/002.png"]),
        (True, ["bolt/test/crack/003.png", "bolt/test/crack/004.png", "bolt/test/good/000.png"]),
        (True, ["bolt/test/good/001.png", "bolt/test/good/002.png"]),
        (False, ["nut/test/crack/000.png", "nut/test/crack/001.png", "nut/test/crack/002.png"]),
        (False, ["nut/test/good/000.png", "nut/test/good/001.png"]),
    ]
    marked = [bool(mask.any()) for batch in batches if batch.gt_mask is not None for mask in batch.gt_mask]
    assert marked == [True, True, True, True, False, False, False]


def test_balanced_batches_show_small_categories_as_often(tmp_path, mvtec):
    mvtec(tmp_path, "bolt", train=21)
    mvtec(tmp_path, "nut", train=5)
    module = module_of(tmp_path, sampling="balanced", samples_per_epoch=16)
    names = [name for batch in module.train_dataloader() for name in batch.category]
    assert (names.count("bolt"), names.count("nut")) == (8, 8)


def test_augmentations_touch_the_training_images_alone(products):
    plain, flipped = (module_of(products, train_augmentations=a) for a in (None, RandomHorizontalFlip(p=1)))
    torch.testing.assert_close(flipped.train_data[0].image, plain.train_data[0].image.flip(-1))
    torch.testing.assert_close(flipped.val_data[0].image, plain.val_data[0].image)
    torch.testing.assert_close(flipped.test_data[0].image, plain.test_data[0].image)


def test_a_part_of_a_dataset_keeps_its_masks_and_refuses_duplicates(module):
    part = module.test_data.subsample([5, 1])
    assert part.samples["image_path"].tolist() == [module.test_data.samples["image_path"][i] for i in (5, 1)]
    assert (part[0].gt_mask is None, len(module.test_data)) == (False, 24)
    with pytest.raises(ValueError, match="No duplicates allowed in indices"):
        module.test_data.subsample([1, 1])


def test_an_unreadable_training_image_stops_before_training_and_is_named(mixed):
    bad = mixed / "nut/train/good/004.png"
    truncate(bad)
    with pytest.raises(UadxError) as error:
        module_of(mixed)
    assert error.value.message == f"{bad}: cannot be decoded: image file is truncated"


def test_an_unreadable_training_image_is_left_out_and_recorded_on_demand(mixed):
    bad = mixed / "nut/train/good/004.png"
    truncate(bad)
    module = module_of(mixed, skip_bad=True)
    assert module.skipped == {str(bad): "cannot be decoded: image file is truncated"}
    assert str(bad) not in module.table.paths
    assert len(module.train_data) + len(module.val_data) == 10
    assert sum(len(batch) for batch in module.train_dataloader()) == len(module.train_data)


@pytest.mark.parametrize(("stage", "opened"), [("fit", 11), ("test", 0)])
def test_training_images_are_verified_once_and_only_for_training(mixed, monkeypatch, stage, opened):
    calls = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: calls.append(path) or original(path, **options))
    module = module_of(mixed, stage)
    module.setup(stage)
    assert len(calls) == len(set(calls)) == opened


def test_no_normal_training_images_is_refused(tmp_path, mvtec):
    mvtec(tmp_path, "bolt", train=0)
    with pytest.raises(UadxError) as error:
        module_of(tmp_path)
    assert error.value.message == f"{tmp_path}: no normal training images"
    assert len(module_of(tmp_path, "test").test_data) == 4


def test_what_is_held_out_can_stay_when_the_order_changes(products):
    one, other, apart = (module_of(products, seed=n, split_seed=s) for n, s in ((0, 0), (1, 0), (0, 1)))
    assert held_out_of(one.table) == held_out_of(other.table) != held_out_of(apart.table)
    first, second = ([p for batch in module.train_dataloader() for p in batch.image_path] for module in (one, other))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(products, fraction):
    with pytest.raises(UadxError) as error:
        UnifiedDataModule(str(products), val_fraction=fraction)
    assert error.value.message == f"val_fraction is {fraction}"


def test_an_unknown_category_is_refused(products):
    with pytest.raises(UsageError, match="unknown category 'wascher'"):
        module_of(products, categories=["wascher"])


def test_loader_processes_give_the_same_batches(products):
    alone, helped = (module_of(products, categories=["fabric"], num_workers=n) for n in (0, 1))
    for here, there in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert here.image_path == there.image_path
        torch.testing.assert_close(here.image, there.image)


def test_anomalib_itself_trains_tests_and_predicts_with_it(products, tmp_path):
    with warnings.catch_warnings():
        # Importing all of anomalib's models imports what timm is about to remove; none of it is ours.
        warnings.simplefilter("ignore")
        from anomalib.engine import Engine
        from anomalib.models import Padim

        module = UnifiedDataModule(str(products), train_batch_size=4, eval_batch_size=5, num_workers=0)
        model = Padim(
            backbone="resnet18",
            layers=["layer1"],
            pre_trained=False,
            n_features=4,
            pre_processor=Padim.configure_pre_processor((48, 40)),
            visualizer=False,
        )
        engine = Engine(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        engine.fit(model, datamodule=module)
        (figures,) = engine.test(model, datamodule=module)
        predicted = engine.predict(model, datamodule=module)
    assert set(figures) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
    assert module.train_data.image_size == module.test_data.image_size == (48, 40)
    assert [name for batch in predicted for name in batch.category] == ["connector"] * 8 + ["fabric"] * 8 + ["washer"] * 8
    assert [path for batch in predicted for path in batch.image_path] == module.test_data.samples["image_path"].tolist()


def test_cached_images_are_the_decoded_ones(products, tmp_path):
    cache = PixelCache(tmp_path / "pixels", (48, 32))
    with_cache, without = (UnifiedDataModule(str(products), image_size=(48, 32)) for _ in range(2))
    with_cache.table = with_cache.index()
    with_cache.verify_images(cache=cache)
    for module in (with_cache, without):
        module.setup("fit")
    assert with_cache.train_data.cache is cache
    assert with_cache.test_data.cache is None
    for part in ("train_data", "val_data"):
        ours, theirs = getattr(with_cache, part), getattr(without, part)
        assert len(ours) == len(theirs)
        for index in range(len(ours)):
            assert ours[index].image_path == theirs[index].image_path
            assert torch.equal(ours[index].image, theirs[index].image)
    subset = with_cache.train_data.subsample([5, 2])
    assert torch.equal(subset[1].image, without.train_data[2].image)
    assert cache._place.stat().st_size == 30 * 48 * 32 * 3
    cache.remove()


def test_cached_rows_stay_right_when_bad_images_are_left_out(products, tmp_path):
    data = shutil.copytree(products, tmp_path / "data")
    victims = sorted((data / "fabric" / "train" / "good").iterdir())
    victims[0].write_bytes(b"")
    victims[4].write_bytes(b"")
    module = UnifiedDataModule(str(data), image_size=32, skip_bad=True)
    module.table = module.index()
    cache = PixelCache(tmp_path / "pixels", (32, 32))
    module.verify_images(cache=cache)
    module.setup("fit")
    assert sorted(module.skipped) == [str(victims[0]), str(victims[4])]
    for part in (module.train_data, module.val_data):
        for index in range(len(part)):
            item = part[index]
            fresh = torch.from_numpy(np.array(resize_rgb(read_rgb(item.image_path), (32, 32)))).permute(2, 0, 1) / 255
            assert torch.allclose(item.image, fresh)
    cache.remove()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("proc", [True, False])
def test_the_cache_survives_going_to_worker_processes(products, tmp_path, monkeypatch, proc):
    if not proc:
        monkeypatch.setattr(PixelCache, "_nameless", lambda self, descriptor: self.path)
    module = UnifiedDataModule(str(products), image_size=32, num_workers=2, train_batch_size=4)
    module.table = module.index()
    cache = PixelCache(tmp_path / "pixels", (32, 32))
    module.verify_images(cache=cache)
    module.setup("fit")
    first = module.train_data[0].image
    batches = list(module.train_dataloader())
    seen = {path: image for batch in batches for path, image in zip(batch.image_path, batch.image, strict=True)}
    assert torch.equal(torch.as_tensor(seen[module.train_data[0].image_path]), torch.as_tensor(first))
    assert len(seen) == 27
    copy = pickle.loads(pickle.dumps(module._cache))
    assert np.array_equal(copy.read(3), module._cache.read(3))
    cache.remove()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the file keeps its name here")
def test_a_killed_training_leaves_no_decoded_images(tmp_path):
    cache = PixelCache(tmp_path / "pixels", (32, 32))
    (tmp_path / "pixels").write_bytes(b"of an earlier one")
    cache.write(0, Image.new("RGB", (10, 10), "red"))
    assert list(tmp_path.iterdir()) == []
    assert cache.read(0)[0, 0].tolist() == [255, 0, 0]
    cache.remove()


def test_a_cache_that_would_be_too_large_is_not_made(tmp_path):
    cache = PixelCache(tmp_path / "pixels", (256, 256))
    assert cache.fits(10)
    assert not cache.fits(10**7)
    cache.write(0, Image.new("RGB", (10, 10), "red"))
    cache.remove()
    assert not (tmp_path / "pixels").exists()
