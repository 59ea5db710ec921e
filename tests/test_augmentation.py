"""Training images varied by what good parts may look like."""

from itertools import combinations

import pytest
import torch
from runs import small_config, small_run
from students import good_batch

from uad_plugins.artifacts import Run
from uad_plugins.config import AugmentationConfig, read_yaml
from uad_plugins.errors import UsageError
from uad_plugins.models import recipe
from uad_plugins.models.augmentation import Augmentation
from uad_plugins.models.conditional import RecognisingTeacher

EVERYTHING = {"shift": 0.1, "rotate": 10, "scale": 0.1, "flip": "both", "brightness": 0.1, "contrast": 0.1}


class Place:
    """Where in a training a batch is."""

    def __init__(self, current_epoch=0, global_rank=0):
        self.current_epoch, self.global_rank = current_epoch, global_rank


def varied(images, place=None, batch_idx=0, **config):
    batch = good_batch(images.clone())
    Augmentation(AugmentationConfig(**config)).on_train_batch_start(None, place or Place(), batch, batch_idx)
    return batch.image


def gradients(count=8):
    """Images that grow brighter to the right, 0.25..0.75, with a bright row and a dark column that tell directions."""
    ramp = torch.linspace(0.25, 0.75, 64).expand(count, 3, 64, 64).clone()
    ramp[:, :, 8], ramp[:, :, :, 4] = 0.9, 0.1
    return ramp


@pytest.mark.parametrize("changed", ["seed", "current_epoch", "global_rank", "batch_idx"])
def test_seed_epoch_batch_and_process_say_what_varies(changed):
    images = gradients()
    torch.manual_seed(1)
    before, state = varied(images, **EVERYTHING), torch.random.get_rng_state()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(varied(images, **EVERYTHING), before)
    place = Place(**({changed: 1} if changed in ("current_epoch", "global_rank") else {}))
    torch.manual_seed(2 if changed == "seed" else 1)
    assert not torch.equal(varied(images, place, int(changed == "batch_idx"), **EVERYTHING), before)


def test_each_image_varies_by_itself_and_stays_an_image():
    images = gradients()
    result = varied(images, share=1.0, **EVERYTHING)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert 0 <= result.min() < result.max() <= 1
    assert all(not torch.equal(result[0], other) for other in result[1:])


def test_some_images_stay_as_they_are():
    images = gradients(200)
    same = (varied(images, share=0.3, brightness=0.1) == images).all(dim=(1, 2, 3)).float().mean()
    assert same == pytest.approx(0.7, abs=0.1)


def test_no_border_shows_when_parts_move():
    images = torch.full((32, 3, 64, 64), 0.6)
    assert torch.allclose(varied(images, share=1.0, shift=0.2, rotate=30, scale=0.2), images, atol=1e-4)


@pytest.mark.parametrize(
    ("flip", "kinds"), [("horizontal", {(3,), ()}), ("vertical", {(2,), ()}), ("both", {(2, 3), (3,), (2,), ()})]
)
def test_images_are_mirrored_as_allowed(flip, kinds):
    images = gradients(64)
    result = varied(images, share=1.0, flip=flip)
    found = [
        next(k for k in ((), (2,), (3,), (2, 3)) if torch.allclose(one, images[0].flip([d - 1 for d in k])))
        for one in result
    ]
    assert set(found) == kinds
    # Each flip happens to every second image.
    assert 0.3 < sum(3 in kind or 2 in kind for kind in found) / 64 < 0.9


def spots(images):
    """Return centre (x, y), area and angle of the longer axis, in degrees, of the bright spot in each image."""
    weights = images[:, 0].double()
    y, x = torch.meshgrid(*(torch.arange(64, dtype=torch.float64),) * 2, indexing="ij")
    area = weights.sum(dim=(1, 2))
    centre = [(weights * at).sum(dim=(1, 2)) / area for at in (x, y)]
    dx, dy = (at - middle[:, None, None] for at, middle in zip((x, y), centre, strict=True))
    xx, xy, yy = ((weights * product).sum(dim=(1, 2)) for product in (dx * dx, dx * dy, dy * dy))
    return *centre, area, torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy))


@pytest.mark.parametrize(
    ("what", "amount", "which", "most"),
    [("shift", 0.1, 0, 6.4), ("shift", 0.1, 1, 6.4), ("scale", 0.2, 2, 0.44), ("rotate", 20.0, 3, 20.0)],
)
def test_parts_move_as_far_as_they_may_and_no_farther(what, amount, which, most):
    spot = torch.zeros(1, 3, 64, 64)
    spot[:, :, 28:36, 22:42] = 1.0
    before, after = (
        spots(images)[which] for images in (spot, varied(spot.repeat(300, 1, 1, 1), share=1.0, **{what: amount}))
    )
    # An area grows by the square of the scale; directions are those of both signs.
    moved = after / before - 1 if what == "scale" else after - before
    assert 0.85 * most < moved.max() <= 1.02 * most
    assert -most * 1.02 <= moved.min() < -0.7 * most


@pytest.mark.parametrize("what", ["brightness", "contrast"])
def test_light_changes_as_far_as_it_may_and_no_farther(what):
    images = torch.full((300, 3, 64, 64), 0.5)
    changed = varied(images, share=1.0, **{what: 0.1}) - images
    most = 0.1 if what == "brightness" else 0.05
    assert 0.9 * most < changed.max() <= most + 1e-6
    assert -most - 1e-6 <= changed.min() < -0.9 * most
    # All of an image alike.
    assert (changed.flatten(1).std(dim=1) < 1e-6).all()


@pytest.mark.parametrize("config", [{}, {"share": 0.5}])
def test_nothing_varies_unasked(config):
    assert not AugmentationConfig(**config)


def test_a_training_sees_varied_images(products, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Augmentation, "on_train_batch_start", lambda _s, _t, _m, batch, _i: seen.append(batch.image.clone()))
    small_run(products, tmp_path / "run", {"augmentation": {"shift": 0.1}, "trainer": {"max_epochs": 1}})
    assert len(seen) == 4
    # RGB in 0..1, at the network's size: before the model's own pre-processing.
    assert all(images.shape[1:] == (3, 64, 64) and images.min() >= 0 and 0.5 < images.max() <= 1 for images in seen)
    assert read_yaml(Run.open(tmp_path / "run").config_file)["augmentation"]["shift"] == 0.1


def test_it_changes_what_is_learnt(products, tmp_path):
    losses = [
        small_run(products, tmp_path / name, {"augmentation": over, "trainer": {"max_epochs": 1}})["best_val_loss"]
        for name, over in (("plain", {}), ("varied", EVERYTHING), ("again", EVERYTHING))
    ]
    assert losses[1] == losses[2] != losses[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shift": 0.6}, "augmentation.shift"),
        ({"rotate": -1}, "augmentation.rotate"),
        ({"flip": "sideways"}, "augmentation.flip"),
        ({"share": 2}, "augmentation.share"),
        ({"share": 0}, "augmentation.share"),
        ({"rotation": 3}, "augmentation.rotat"),
        ({"brightness": 0.6}, "augmentation.brightness"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        small_config({"augmentation": wrong})


@pytest.fixture
def seen(monkeypatch):
    """Batches of images and products, by training, that telling products apart is learnt from."""
    seen, learn = [], RecognisingTeacher.learn
    monkeypatch.setattr(
        RecognisingTeacher, "learn", lambda self, found: learn(self, seen.append(found := list(found)) or found)
    )
    return seen


@pytest.mark.parametrize(("enough", "passes"), [(recipe.ENOUGH, recipe.PASSES), (0.05, 2)])
def test_the_recognition_of_products_learns_from_varied_images(products, tmp_path, monkeypatch, seen, enough, passes):
    """Until it has seen enough of them, at most so often, each time otherwise; if they are always the same, once."""
    monkeypatch.setattr(recipe, "ENOUGH", enough)
    for over in ({}, {"contrast": 0.4, "share": 1.0}):
        options = {"model": {"options": {"conditional_norm": True}}, "trainer": {"max_epochs": 1}, "augmentation": over}
        small_run(products, tmp_path / str(len(seen)), options)
    plain, varied_ones = (torch.cat([images for images, _ in found]) for found in seen)
    shown = [plain, *varied_ones.chunk(passes)]
    assert {images.shape for images in shown} == {plain.shape}
    assert not any(torch.allclose(one, other) for one, other in combinations(shown, 2))
    once, often = (torch.cat([labels for _, labels in found]) for found in seen)
    assert torch.equal(often, once.repeat(passes))


def test_the_recognition_of_products_has_seen_enough_of_any_number_of_images(products, tmp_path, monkeypatch, seen):
    """Or its memory would grow with them."""
    over = {"model": {"options": {"conditional_norm": True, "synthetic_anomalies": 0.8}}, "data": {"train_batch_size": 2}}
    for enough, most in ((recipe.ENOUGH, recipe.MOST), (0, 4)):
        monkeypatch.setattr(recipe, "ENOUGH", enough)
        monkeypatch.setattr(recipe, "MOST", most)
        small_run(products, tmp_path / str(most), {**over, "trainer": {"max_epochs": 1}})
    numbers = [torch.cat([labels for _, labels in found]).bincount() for found in seen]
    assert (numbers[0] == numbers[0][0]).all()
    assert numbers[0][0] > 20
    # A batch that shows a product too rarely seen may show another one besides.
    assert (numbers[1] >= 4).all()
    assert (numbers[1] <= 6).all()
