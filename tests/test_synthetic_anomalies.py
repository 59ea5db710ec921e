"""Defects drawn into good parts, and what the students learn from them."""

import pytest
import torch
from anomalib.models import ReverseDistillation as AnomalibReverseDistillation
from anomalib.models import Stfpm as AnomalibStfpm
from runs import small_run
from students import SIZE, build, good_batch, in_training
from torch.nn import functional as F

from uad_plugins.errors import UsageError
from uad_plugins.models import ReverseDistillation, Stfpm
from uad_plugins.models.backbones import alias, backbone_weights
from uad_plugins.models.chances import ANOMALIES, DROPOUT, chances_of
from uad_plugins.models.descriptors import anomaly_loss, distances
from uad_plugins.models.options import FILLINGS
from uad_plugins.models.synthetic_anomalies import MAKERS, MIN_CHANGE, MIN_OPACITY, Material, SyntheticAnomalies


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def textured(count, side=8):
    """Normalised images with something to be seen everywhere, ``-1..1``."""
    return doubled(F.interpolate(torch.rand(count, 3, side, side, generator=seeded(9)), SIZE, mode="bilinear"))


def doubled(images):
    return images * 2 - 1


@pytest.fixture(scope="module")
def bank():
    some = SyntheticAnomalies(0.5)
    some.draw(textured(1), doubled, seeded())
    return some._bank


@pytest.fixture
def make(bank):
    def made(share, *args, **kwargs):
        some = SyntheticAnomalies(share, *args, **kwargs)
        some._bank = bank
        return some

    return made


def test_images_are_blended_with_anomalies_by_their_opacity(make):
    images = textured(64)
    drawn, opacity = make(0.5).draw(images, doubled, seeded())
    assert drawn.shape == images.shape
    assert drawn.dtype == torch.float32
    assert opacity.shape == (64, 1, *SIZE)
    strongest = opacity.amax(dim=(1, 2, 3))
    chosen = strongest > 0
    assert 16 < chosen.sum() < 48
    assert strongest.max() <= 1
    # Where none is to be seen the image may be changed, but by less than counts.
    unseen = (drawn - images).abs().mean(dim=1, keepdim=True)[opacity == 0]
    assert unseen.max() < 2 * MIN_CHANGE
    assert (unseen == 0).float().mean() > 0.9
    # Fillings lie in 0..1 before they are normalised, -1..1 after: a pixel moves by its share of the way to one of them.
    filling = ((drawn - images * (1 - opacity)) / opacity)[(opacity > 0.05).expand_as(drawn)]
    assert filling.min() >= -1 - 1e-3
    assert filling.max() <= 1 + 1e-3
    assert filling.std() > 0.1
    areas = (opacity[chosen] > 0).float().mean(dim=(1, 2, 3))
    assert areas.min() > 0
    assert areas.max() < 0.6


def test_no_two_are_alike_and_a_seed_gives_them_again(make):
    images = textured(24)
    drawn, opacity = make(1.0, ["noise"]).draw(images, doubled, seeded(3))
    assert len(torch.unique((opacity > 0).flatten(1), dim=0)) == 24
    again = SyntheticAnomalies(1.0, ["noise"]).draw(images, doubled, seeded(3))
    assert torch.equal(again[0], drawn)
    assert torch.equal(again[1], opacity)
    assert not torch.equal(make(1.0, ["noise"]).draw(images, doubled, seeded(4))[1], opacity)


def test_the_bank_disturbs_no_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    SyntheticAnomalies(1.0).draw(torch.zeros(1, 3, 32, 32), doubled, seeded())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, 16)])
def test_the_share_of_images_that_get_one(make, share, count):
    images = torch.zeros(16, 3, *SIZE)
    drawn, opacity = make(share, ["noise"]).draw(images, doubled, seeded())
    changed = (drawn != images).flatten(1).any(dim=1)
    assert changed.sum() == count
    assert (opacity.flatten(1).amax(dim=1) > 0).sum() >= 0.7 * count
    assert not opacity[~changed].any()


def test_images_of_any_size():
    some = SyntheticAnomalies(1.0)
    for size in ((32, 48), (70, 100), (64, 64)):
        images = torch.rand(6, 3, *size, generator=seeded())
        drawn, opacity = some.draw(images, doubled, seeded())
        assert drawn.shape[-2:] == opacity.shape[-2:] == size
        assert (drawn != images).flatten(1).any(dim=1).all()
        assert (opacity.amax(dim=(1, 2, 3)) > 0).all()


def material(chances, size=SIZE, shapes=None):
    parts, others = (
        F.interpolate(torch.rand(2, 3, side, side, generator=seeded(side)), size, mode="bilinear") for side in (8, 5)
    )
    if shapes is None:
        shapes = torch.randint(0, 256, (2, 4, *size), dtype=torch.uint8, generator=seeded(1))
    return Material(parts, others, shapes, torch.tensor([[0.0, 0.0, 0.9, 0.9]] * 2), torch.tensor([chances] * 2))


def test_noise_is_that_of_the_bank_and_goes_on_beyond_the_shape():
    shapes = torch.zeros(2, 4, *SIZE, dtype=torch.uint8)
    shapes[:, :3, 20:40, 10:50], shapes[:, 3, 20:40, 10:50] = 153, 255
    made = MAKERS["noise"](material([0.3] * 4, shapes=shapes))
    # Two pixels are what edges fade across at this size.
    assert torch.allclose(made[..., 18:42, 8:52], torch.tensor(0.6))
    assert not made[..., :10, :].any()


def test_each_filling_is_as_frequent_whether_edges_fade_or_not(make, monkeypatch):
    values = dict(zip(FILLINGS, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True))
    for name, value in values.items():
        monkeypatch.setitem(MAKERS, name, lambda material, value=value: torch.full_like(material.parts, value))
    some, grey = make(1.0), torch.full((400, 3, *SIZE), 2.0)
    drawn, opacity = some.draw(grey, doubled, seeded(5))
    filled = {True: [], False: []}
    visible = opacity.flatten(1).any(dim=1)
    assert visible.float().mean() > 0.9
    for image, covered in zip(drawn[visible], opacity[visible], strict=True):
        place = covered.flatten().argmax()
        moved = (image[0].flatten()[place] - 2) / covered.flatten()[place]
        filled[len(covered.unique()) > 2].append(round(((moved + 2 + 1) / 2).item(), 2))
    for found in filled.values():
        assert set(found) == set(values.values())
        assert all(0.1 < found.count(value) / len(found) < 0.3 for value in values.values())


@pytest.mark.parametrize("transform", [lambda images: images - images.mean(dim=(-2, -1), keepdim=True), torch.zeros_like])
def test_only_scaled_channels_can_be_drawn_into(transform):
    with pytest.raises(UsageError, match="Normalize"):
        SyntheticAnomalies(1.0).draw(torch.rand(2, 3, 32, 32), transform, seeded())


@pytest.mark.parametrize(("darker", "less"), [(0.1, True), (0.9, False)])
@pytest.mark.parametrize("by_factor", [0.1, 0.9])
def test_a_surface_of_another_tone(darker, by_factor, less):
    given = material([darker, by_factor, 0.5, 0.0])
    made = MAKERS["discolour"](given)
    inside = (made > 0) & (made < 1)
    assert (made[inside] < given.parts[inside]).all() if less else (made[inside] > given.parts[inside]).all()
    change = made / given.parts if by_factor < 0.5 else made - given.parts
    assert change[inside].std() < 1e-5
    assert 0 <= made.min() <= made.max() <= 1


@pytest.mark.parametrize("size", [SIZE, (100, 70)])
def test_a_surface_without_its_details(size):
    given = material([0.5] * 4, size)
    fine = given._replace(parts=(given.parts + torch.rand(2, 3, *size, generator=seeded(2))) / 2)
    made = MAKERS["blur"](fine)
    assert torch.allclose(made.mean(dim=(2, 3)), fine.parts.mean(dim=(2, 3)), atol=0.02)
    assert (made[..., 1:] - made[..., :-1]).abs().mean() < (fine.parts[..., 1:] - fine.parts[..., :-1]).abs().mean() / 4
    # What was at a place stays there.
    ramp = torch.linspace(0, 1, size[0])[:, None].expand(2, 3, *size)
    blurred = MAKERS["blur"](given._replace(parts=ramp))
    assert torch.allclose(
        blurred[..., size[0] // 8 : -size[0] // 8, :], ramp[..., size[0] // 8 : -size[0] // 8, :], atol=0.02
    )


@pytest.mark.parametrize(("name", "source"), [("misplace", "parts"), ("foreign", "others")])
def test_a_surface_of_another_place(name, source):
    given = material([0.25, 0.75, 0.1, 0.9])
    height, width = SIZE
    expected = getattr(given, source).flip(-2).roll((-height // 4, -width * 3 // 4), (-2, -1))
    assert torch.equal(MAKERS[name](given), expected)


def test_foreign_pieces_are_of_other_images(make):
    images = torch.stack([torch.full((3, *SIZE), value) for value in (-1.0, 0.0, 1.0)])
    drawn, opacity = make(1.0, ["foreign"], 0.0).draw(images, doubled, seeded())
    whole = opacity.amax(dim=(2, 3), keepdim=True)
    for number, other in enumerate((1.0, -1.0, 0.0)):
        inside = (opacity[number] == whole[number]).expand_as(drawn[number])
        expected = torch.lerp(images[number], torch.full_like(images[number], other), whole[number])
        assert torch.allclose(drawn[number][inside], expected[inside], atol=1e-5)


def test_foreign_pieces_may_be_of_the_same_product(make):
    images = torch.stack([torch.full((3, *SIZE), value) for value in (-1.0, 0.0, 1.0)])
    groups = {3: torch.tensor([0, 2]), 5: torch.tensor([1])}
    drawn, opacity = make(1.0, ["foreign"], 0.0).draw(images, doubled, seeded(), groups)
    moved = (drawn - images).mean(dim=1, keepdim=True)
    assert torch.allclose(moved, opacity * torch.tensor([2.0, 0.0, -2.0]).view(-1, 1, 1, 1), atol=1e-5)
    assert [bool(each.any()) for each in opacity] == [True, False, True]


def test_edges_are_sharp_or_fade(make):
    grey = torch.zeros(32, 3, *SIZE)
    _, sharp = make(1.0, ["noise"], 0.0).draw(grey, doubled, seeded())
    _, soft = make(1.0, ["noise"], 1.0).draw(grey, doubled, seeded())
    assert {len(one.unique()) for one in sharp if one.any()} == {2}
    assert min(len(one.unique()) for one in soft if one.any()) > 4
    assert sharp[sharp > 0].min() >= MIN_OPACITY
    # Half of them in a batch, by default.
    _, mixed = make(1.0, ["noise"]).draw(grey, doubled, seeded())
    assert 8 < sum(len(one.unique()) > 2 for one in mixed) < 24


@pytest.mark.parametrize("filling", ["discolour", "blur", "misplace", "foreign"])
def test_what_cannot_be_seen_is_no_anomaly(make, filling):
    white = torch.ones(16, 3, *SIZE)
    drawn, opacity = make(1.0, [filling]).draw(white, doubled, seeded())
    changed = (drawn - white).abs().amax(dim=(1, 2, 3)) >= 2 * MIN_CHANGE
    assert torch.equal(opacity.amax(dim=(1, 2, 3)) > 0, changed)
    assert changed.any() == (filling == "discolour")
    assert not changed.all()


@pytest.mark.parametrize("cls", [Stfpm, ReverseDistillation])
def test_a_training_step_without_them_is_anomalibs(cls, monkeypatch):
    model = in_training(cls, monkeypatch)
    images = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    assert model.anomalies is None
    loss = model.training_step(good_batch(images))["loss"]
    assert torch.allclose(loss, model.loss(*model.model(images)))


def test_stfpm_sees_the_defect_with_both_networks(monkeypatch):
    model = in_training(Stfpm, monkeypatch, synthetic_anomalies=1.0, anomaly_weight=2.0)
    images = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    loss = model.training_step(good_batch(images))["loss"]
    drawn, opacity = model.with_anomalies(images)
    assert torch.allclose(loss, anomaly_loss(*model.model(drawn), opacity, 2.0).mean())
    assert not torch.allclose(loss, model.loss(*model.model(images)))


def test_images_that_nothing_normalises_take_defects_as_they_are():
    # Which anomalies are drawn: with another seed one could be too faint to count.
    torch.manual_seed(0)
    model = Stfpm(
        weights="bundled",
        pre_processor=False,
        visualizer=False,
        synthetic_anomalies=1.0,
        anomaly_fillings=["noise"],
        anomaly_soft_edges=0.0,
    )
    images = torch.zeros(4, 3, *SIZE)
    drawn, opacity = model.with_anomalies(images)
    assert torch.equal(drawn[(opacity == 0).expand_as(drawn)], images[(opacity == 0).expand_as(images)])
    assert drawn.min() >= 0
    assert 0.2 < drawn.max() <= 1


@pytest.mark.parametrize("changed", ["seed", "current_epoch", "global_rank", "batch_idx"])
def test_seed_epoch_batch_and_process_say_which_anomalies(changed, monkeypatch):
    model = build(Stfpm, synthetic_anomalies=1.0)
    images = textured(4)
    torch.manual_seed(1)
    before = model.with_anomalies(images)[1]
    torch.rand(5)
    assert torch.equal(model.with_anomalies(images)[1], before)
    if changed == "seed":
        torch.manual_seed(2)
    elif changed != "batch_idx":
        monkeypatch.setattr(Stfpm, changed, 1)
    assert not torch.equal(model.with_anomalies(images, int(changed == "batch_idx"))[1], before)


def test_each_purpose_of_a_batch_has_chances_of_its_own():
    model, places = build(Stfpm), ((0, ANOMALIES), (0, ANOMALIES), (0, DROPOUT), (1, ANOMALIES))
    first, again, other, next_one = (torch.rand(9, generator=chances_of(model, *at)) for at in places)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(next_one, other)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_reverse_distillation_restores_the_good_part(share, monkeypatch):
    model = in_training(ReverseDistillation, monkeypatch, synthetic_anomalies=share)
    images = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    loss = model.training_step(good_batch(images))["loss"]
    loss.backward()
    drawn, opacity = model.with_anomalies(images)
    count = (opacity.amax(dim=(1, 2, 3)) > 0).sum()
    assert count == 4 if share == 1 else 0 < count < 4
    (clean, _), (spoilt, decoded) = model.model(images), model.model(drawn)
    assert torch.allclose(loss, model.loss(clean, decoded), atol=1e-5)
    assert not torch.allclose(loss, model.loss(spoilt, decoded))


OPTIONS = {"synthetic_anomalies": 0.5, "anomaly_fillings": ["blur", "foreign"], "anomaly_soft_edges": 0.25}


@pytest.mark.parametrize("name", ["stfpm", "reverse_distillation"])
def test_it_is_trained_by_an_option(name, products, tmp_path):
    over = {"model": {"name": name, "options": OPTIONS}, "trainer": {"max_epochs": 1}}
    small_run(products, tmp_path / "run", over)
    small_run(products, tmp_path / "published", {"model": {"name": name}, "trainer": {"max_epochs": 1}})
    cls = Stfpm if name == "stfpm" else ReverseDistillation
    loaded = cls.load_from_checkpoint(tmp_path / "run" / "model.ckpt", map_location="cpu")
    assert loaded.anomalies.share == 0.5
    assert loaded.anomalies.fillings == ("blur", "foreign")
    assert loaded.anomalies.soft_edges == 0.25
    other = cls.load_from_checkpoint(tmp_path / "published" / "model.ckpt", map_location="cpu")
    assert other.anomalies is None
    pairs = zip(loaded.trained_parameters(), other.trained_parameters(), strict=True)
    assert not all(torch.equal(mine, published) for mine, published in pairs)
    # anomalib's own classes know nothing of the option.
    theirs = AnomalibStfpm if name == "stfpm" else AnomalibReverseDistillation
    backbone = {"backbone": alias("resnet18")} if name == "stfpm" else {}
    with backbone_weights("bundled"):
        theirs.load_from_checkpoint(tmp_path / "run" / "model.ckpt", map_location="cpu", **backbone)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stfpm", {"synthetic_anomalies": 1.5}, "synthetic_anomalies"),
        ("stfpm", {"synthetic_anomalies": True}, "synthetic_anomalies"),
        ("stfpm", {"anomaly_weight": 0}, "anomaly_weight"),
        ("stfpm", {"anomaly_weight": float("inf")}, "anomaly_weight"),
        ("reverse_distillation", {"synthetic_anomalies": -1}, "synthetic_anomalies"),
        ("stfpm", {"synthetic_anomaly": 0.5}, "synthetic_anomalies"),
        ("stfpm", {"anomaly_fillings": ["paint"]}, "anomaly_fillings"),
        ("reverse_distillation", {"anomaly_fillings": []}, "anomaly_fillings"),
        ("stfpm", {"anomaly_soft_edges": 2.0}, "anomaly_soft_edges"),
    ],
)
def test_wrong_options_are_refused(name, options, message, products, tmp_path):
    with pytest.raises(UsageError, match=message):
        small_run(products, tmp_path / "run", {"model": {"name": name, "options": options}})
    assert not (tmp_path / "run").exists()


def test_a_student_learns_to_keep_its_distance(bank):
    """Two students after the same steps: the one that was shown defects follows its teacher less far into others."""
    generator = torch.Generator().manual_seed(0)
    parts = F.interpolate(torch.rand(24, 3, 4, 4, generator=generator), SIZE, mode="bilinear")
    unseen = SyntheticAnomalies(1.0, ["noise"], 0.0)
    unseen._bank = bank[:64]

    def distance(**options):
        model = build(Stfpm, **options).train()
        model.log = lambda *_, **__: None
        normalize = model.pre_processor.transform
        optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.5, momentum=0.9)
        if model.anomalies is not None:
            model.anomalies._bank = bank[64:]
        torch.manual_seed(2)
        for _ in range(40):
            optimizer.zero_grad()
            model.training_step(good_batch(normalize(parts[:16])))["loss"].backward()
            optimizer.step()
        model.eval()
        drawn, opacity = unseen.draw(normalize(parts[16:]), normalize, seeded(3))
        with torch.no_grad():
            found = distances(model.model.teacher_model(drawn), model.model.student_model(drawn))[0]
        covered = F.interpolate(opacity, found.shape[-2:], mode="area")[:, 0]
        return found[covered > 0.25].mean().item()

    shown = {"synthetic_anomalies": 0.8, "anomaly_fillings": ["noise"], "anomaly_soft_edges": 0.0, "anomaly_weight": 30.0}
    assert distance(**shown) > 1.5 * distance()
