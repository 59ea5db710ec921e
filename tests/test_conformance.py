"""The conformance kit: the built-in plugins pass it, and broken ones do not."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from uad_plugins.data.layouts import folder as folder_layout
from uad_plugins.data.layouts.walking import images
from uad_plugins.data.samples import Sample
from uad_plugins.hookspecs import LayoutPlugin, Requirement, RuntimePlugin
from uad_plugins.registry import registry
from uad_plugins.testing import LayoutConformance, ModelConformance, RuntimeConformance
from uad_plugins.testing.common import registered, write_files

FOLDER = tuple(f"bolt/good/{n:03d}.png" for n in range(12)) + ("bolt/crack/1.png", "bolt/masks/crack/1.png", "nut/ok/1.png")


class TestMvtec(LayoutConformance):
    plugin = "mvtec"
    files = (
        "bolt/train/good/1.png",
        "bolt/test/good/1.png",
        "bolt/test/crack/1.png",
        "bolt/ground_truth/crack/1_mask.png",
        "nut/train/good/1.png",
    )


class TestVisa(LayoutConformance):
    plugin = "visa"
    files = (
        *(f"candle/Data/Images/Normal/{n:03d}.JPG" for n in range(12)),
        "candle/Data/Images/Anomaly/000.JPG",
        "candle/Data/Masks/Anomaly/000.png",
    )


class TestFolder(LayoutConformance):
    plugin = "folder"
    files = FOLDER


class TestIndex(LayoutConformance):
    plugin = "index"

    def make_example(self, root: Path) -> None:
        write_files(root, ["a/1.png", "a/2.png", "a/2_mask.png"])
        (root / "index.csv").write_text(
            "path,category,split,label,mask\na/1.png,a,train,0,\na/2.png,a,test,1,a/2_mask.png\n"
        )


class TestStfpm(ModelConformance):
    plugin = "stfpm"


@pytest.mark.slow
class TestReverseDistillation(ModelConformance):
    plugin = "reverse_distillation"


class TestTorch(RuntimeConformance):
    plugin = "torch"

    @pytest.fixture
    def station(self, trained):
        return trained


def failures(kit, tmp_path):
    """Run the checks of a kit that need no more than a folder; return the names of those that fail."""
    failed = set()
    with registered(kit.kind, kit.item):
        for number, (name, check) in enumerate(inspect.getmembers(kit, inspect.ismethod)):
            if not name.startswith("test_") or not set(inspect.signature(check).parameters) <= {"tmp_path"}:
                continue
            folder = tmp_path / str(number)
            folder.mkdir()
            try:
                check(folder) if inspect.signature(check).parameters else check()
            except AssertionError:
                failed.add(name)
    return failed


def broken_layout(tmp_path, **changes):
    kit = LayoutConformance()
    kit.plugin = replace(registry().get("layout", "folder"), name="broken", priority=1, **changes)
    kit.files = FOLDER
    return failures(kit, tmp_path)


def opening(root):
    for sample in folder_layout.scan(root):
        with Image.open(sample.path):
            yield sample


def opening_quietly(root):
    for path in images(root):
        try:
            size = Image.open(path).size
        except OSError:
            continue
        yield Sample(path, str(size), 0, "train", defect="good")


def changed(**fields):
    return lambda root: [replace(sample, **fields) for sample in folder_layout.scan(root)]


def relative(root):
    return [replace(sample, path=str(Path(sample.path).relative_to(root))) for sample in folder_layout.scan(root)]


def maskless(root):
    return [replace(sample, mask=f"{sample.path}.gone") for sample in folder_layout.scan(root)]


def writing(root):
    (root / "cache.json").touch()
    return folder_layout.scan(root)


def once():
    seen = []
    return lambda root: [] if seen else seen.append(root) or list(folder_layout.scan(root))


def test_a_sound_layout_fails_nothing(tmp_path):
    assert broken_layout(tmp_path) == set()


@pytest.mark.parametrize(
    ("recognise", "failed"),
    [
        (
            lambda root: 1.0,
            {
                "test_it_does_not_claim_an_empty_folder",
                "test_it_does_not_claim_a_foreign_folder",
                "test_it_does_not_claim_a_foreign_file",
            },
        ),
        (lambda root: 0.0, {"test_it_recognises_its_example", "test_it_is_chosen_for_its_example"}),
        (lambda root: 100 * folder_layout.recognise(root), {"test_it_recognises_its_example"}),
        (lambda root: folder_layout.recognise(root) / 2, {"test_it_is_chosen_for_its_example"}),
        (lambda root: folder_layout.recognise(root) * str(root).isascii(), {"test_it_works_wherever_the_data_lies"}),
    ],
)
def test_a_layout_that_recognises_the_wrong_things_is_caught(tmp_path, recognise, failed):
    assert broken_layout(tmp_path, recognise=recognise) == failed


@pytest.mark.parametrize(
    ("scan", "failed"),
    [
        (opening, {"test_it_opens_no_image"}),
        (opening_quietly, {"test_it_opens_no_image", "test_it_trains_on_good_images_alone"}),
        (relative, {"test_samples_are_well_formed"}),
        (maskless, {"test_samples_are_well_formed"}),
        (changed(split="training"), {"test_samples_are_well_formed", "test_it_trains_on_good_images_alone"}),
        (changed(split="train"), {"test_it_trains_on_good_images_alone"}),
        (changed(category=""), {"test_samples_are_well_formed"}),
        (changed(defect=""), {"test_samples_are_well_formed"}),
        (writing, {"test_it_changes_nothing"}),
        (lambda root: [*folder_layout.scan(root), *folder_layout.scan(root)], {"test_samples_are_well_formed"}),
    ],
)
def test_a_layout_that_lists_the_wrong_things_is_caught(tmp_path, scan, failed):
    assert broken_layout(tmp_path, scan=scan) == failed


def test_a_layout_that_does_not_repeat_itself_is_caught(tmp_path):
    assert "test_it_gives_the_same_samples_twice" in broken_layout(tmp_path, scan=once())


def test_a_poor_description_is_caught(tmp_path):
    assert broken_layout(tmp_path, summary="two\nlines") == {"test_its_description_is_complete"}


def test_a_kit_without_a_plugin_or_an_example_says_what_to_set(tmp_path):
    kit = LayoutConformance()
    with pytest.raises(AssertionError, match="set 'plugin' to the name of your layout"):
        kit.test_its_description_is_complete()
    kit.plugin = "mvtec"
    with pytest.raises(AssertionError, match="set 'files' to those of a small data set"):
        kit.test_it_recognises_its_example(tmp_path)


@pytest.mark.parametrize(
    ("runtime", "failed"),
    [
        (RuntimePlugin("broken", "a runtime", lambda folder: object()), "test_it_leaves_a_foreign_folder_to_others"),
        (
            RuntimePlugin("broken", "a runtime", lambda folder: None, (Requirement("acme", ""),)),
            "test_its_requirements_can_be_installed",
        ),
        (LayoutPlugin("broken", "a layout", lambda root: 0.0, lambda root: []), "test_its_description_is_complete"),
    ],
)
def test_a_broken_runtime_is_caught(tmp_path, runtime, failed):
    kit = RuntimeConformance()
    kit.plugin = runtime
    checks = {"test_it_leaves_a_foreign_folder_to_others": (tmp_path,)}
    with registered("runtime", runtime), pytest.raises(AssertionError):
        getattr(kit, failed)(*checks.get(failed, ()))


class TestBrokenModel:
    """A method that loads something other than what was trained, from weights that must still be there."""

    def test_it_is_caught(self, tmp_path, tmp_path_factory, monkeypatch):
        sound = registry().get("model", "stfpm")
        kit = ModelConformance()
        kit.plugin = replace(sound, name="broken", load=lambda path, config: sound.build(config))
        fetched = []
        with registered("model", kit.plugin), pytest.raises(Exception, match="no such file or folder of backbone weights"):
            kit._train(tmp_path, fetched)
