"""The conformance kit: the built-in plugins pass it, and broken ones do not."""

import inspect
import itertools
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uad_plugins.data.layouts import folder as folder_layout
from uad_plugins.data.layouts.walking import images
from uad_plugins.data.samples import Sample
from uad_plugins.detector import Detector, open_detector
from uad_plugins.errors import UadxError
from uad_plugins.hookspecs import LayoutPlugin, Requirement, RuntimePlugin
from uad_plugins.registry import registry
from uad_plugins.testing import LayoutConformance, ModelConformance, RuntimeConformance
from uad_plugins.testing.common import registered, write_files
from uad_plugins.testing.models import offline

FOLDER = (*(f"bolt/good/{n}.png" for n in range(12)), "bolt/crack/1.png", "bolt/masks/crack/1.png", "nut/ok/1.png")


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
        rows = ["path,category,split,label,mask", "a/1.png,a,train,0,", "a/2.png,a,test,1,a/2_mask.png"]
        (root / "index.csv").write_text("\n".join(rows))


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
        with suppress(OSError), Image.open(path) as image:
            yield Sample(path, f"{image.width} wide", 0, "train", defect="good")


def changed(**fields):
    return lambda root: [replace(sample, **fields) for sample in folder_layout.scan(root)]


def relative(root):
    return [replace(sample, path=str(Path(sample.path).relative_to(root))) for sample in folder_layout.scan(root)]


def maskless(root):
    return [replace(sample, mask=f"{sample.path}.gone") for sample in folder_layout.scan(root)]


def writing(root):
    (root / "cache.json").touch()
    return folder_layout.scan(root)


def fickle():
    calls = itertools.count()
    return lambda root: list(folder_layout.scan(root))[next(calls) % 2 :]


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
        (changed(label=2), {"test_samples_are_well_formed", "test_it_trains_on_good_images_alone"}),
        (changed(category=""), {"test_samples_are_well_formed"}),
        (changed(defect=""), {"test_samples_are_well_formed"}),
        (writing, {"test_it_changes_nothing"}),
        (lambda root: [*folder_layout.scan(root), *folder_layout.scan(root)], {"test_samples_are_well_formed"}),
    ],
)
def test_a_layout_that_lists_the_wrong_things_is_caught(tmp_path, scan, failed):
    assert broken_layout(tmp_path, scan=scan) == failed


def test_a_layout_that_opens_images_and_hides_their_errors_is_caught(tmp_path):
    # It finds the same with every image unreadable: only the record of what was opened shows it.
    def peeking(root):
        for sample in folder_layout.scan(root):
            with suppress(OSError), Image.open(sample.path):
                pass
            yield sample

    assert broken_layout(tmp_path, scan=peeking) == {"test_it_opens_no_image"}


def test_a_layout_that_reads_images_without_opening_them_in_python_is_caught(tmp_path):
    # As one does that decodes in C, where nothing can be recorded.
    def by_content(root):
        return [sample for sample in folder_layout.scan(root) if Path(sample.path).stat().st_size]

    assert broken_layout(tmp_path, scan=by_content) == {"test_it_opens_no_image"}


def test_a_layout_that_does_not_repeat_itself_is_caught(tmp_path):
    assert "test_it_gives_the_same_samples_twice" in broken_layout(tmp_path, scan=fickle())


def test_a_poor_description_is_caught(tmp_path):
    assert broken_layout(tmp_path, summary="two\nlines") == {"test_its_description_is_complete"}


def test_a_kit_without_a_plugin_or_an_example_says_what_to_set(tmp_path):
    kit = LayoutConformance()
    with pytest.raises(AssertionError, match="set 'plugin' to the name or description of your layout"):
        kit.test_its_description_is_complete()
    kit.plugin = "mvtec"
    with pytest.raises(AssertionError, match="set 'files' to those of a small data set"):
        kit.test_it_recognises_its_example(tmp_path)


@pytest.mark.parametrize(
    ("runtime", "failed"),
    [
        (RuntimePlugin("broken", "a runtime", lambda folder: object()), {"test_it_leaves_a_foreign_folder_to_others"}),
        (
            RuntimePlugin("broken", "a runtime", lambda folder: None, (Requirement("acme", ""),)),
            {"test_its_requirements_can_be_installed"},
        ),
        (
            RuntimePlugin("broken", "a runtime", lambda folder: None, (Requirement("acme", "pip install it  # a GPU"),)),
            {"test_its_requirements_can_be_installed"},
        ),
        (
            RuntimePlugin("broken", "a runtime", lambda folder: None, (Requirement("json", "pip install it", lambda: ""),)),
            {"test_its_requirements_can_be_installed"},
        ),
        (RuntimePlugin("a name", "a runtime", lambda folder: None), {"test_its_description_is_complete"}),
    ],
)
def test_a_broken_runtime_is_caught(tmp_path, runtime, failed):
    kit = RuntimeConformance()
    kit.plugin = runtime
    assert failures(kit, tmp_path) == failed


def test_a_description_of_another_kind_is_caught():
    kit = RuntimeConformance()
    kit.plugin = LayoutPlugin("broken", "a layout", lambda root: 0.0, lambda root: [])
    with pytest.raises(AssertionError, match="a runtime is described by a RuntimePlugin, not a LayoutPlugin"):
        kit.test_its_description_is_complete()


class Mixing(Detector):
    """Scores an image by what else is in its batch."""

    name, engine, categories, image_size = "mixing", "none", ["bolt"], (32, 48)

    def infer(self, images):
        brightness = images.mean(axis=(1, 2, 3), dtype=np.float32)
        maps = np.ones(images.shape[:3], np.float32) * brightness[:, None, None]
        return brightness - brightness.mean(), maps


class Turned(Mixing):
    """Takes (width, height) for (height, width)."""

    def infer(self, images):
        return np.ones(len(images), np.float32), np.ones((len(images), *self.image_size[::-1]), np.float32)


class Unsure(Mixing):
    """Has no number for any image."""

    def infer(self, images):
        return np.full(len(images), np.nan, np.float32), np.ones(images.shape[:3], np.float32)


@pytest.mark.parametrize(
    ("detector", "check", "message"),
    [
        (Mixing(), "test_a_batch_scores_as_its_images_do", "image 0 scores otherwise alone than in a batch of 3"),
        (Turned(), "test_scores_are_finite_and_maps_have_the_size_of_the_image", "maps are .N, H, W. at image_size"),
        (Unsure(), "test_scores_are_finite_and_maps_have_the_size_of_the_image", "scores are finite numbers"),
    ],
)
def test_a_broken_detector_is_caught(detector, check, message):
    with pytest.raises(AssertionError, match=message):
        getattr(RuntimeConformance(), check)(detector)


def test_a_model_that_needs_its_weights_or_forgets_what_it_learnt_is_caught(tmp_path):
    sound = registry().get("model", "stfpm")
    kit = ModelConformance()
    kit.plugin = replace(sound, name="broken", load=lambda path, config: sound.build(config))
    with registered("model", kit.plugin):
        trained = kit.train_example(tmp_path, [])
        with pytest.raises(UadxError, match="no such file or folder of backbone weights"):
            kit.test_the_run_opens_as_a_detector(trained)
    kit.plugin = replace(sound, name="broken", load=lambda path, config: sound.build(kit.small_config()))
    with registered("model", kit.plugin), open_detector(trained.run) as detector:
        kit.test_scores_are_finite_and_maps_have_the_size_of_the_image(trained, detector)
        with pytest.raises(AssertionError, match=r"load\(\) does not restore .* from the checkpoint"):
            kit.test_a_checkpoint_brings_all_it_learnt(trained, detector, tmp_path)


def test_a_model_that_is_built_for_another_size_or_fetches_is_caught(tmp_path):
    sound = registry().get("model", "stfpm")

    def build(config):
        with suppress(OSError):
            socket.getaddrinfo("weights.invalid", 443)
        return sound.build(config.model_copy(update={"data": config.data.model_copy(update={"image_size": 64})}))

    kit = ModelConformance()
    kit.plugin = replace(sound, name="broken", build=build, load=lambda path, config: build(kit.small_config()))
    with registered("model", kit.plugin), offline(tmp_path) as fetched:
        kit.test_it_is_built_for_the_configured_size((64, 64))
        with pytest.raises(AssertionError, match="the pre-processor gives images of the configured size"):
            kit.test_it_is_built_for_the_configured_size((64, 96))
        assert set(fetched) == {"weights.invalid"}
        trained = kit.train_example(tmp_path, fetched)
        with pytest.raises(AssertionError, match=r"training with local weights asked for weights\.invalid"):
            kit.test_nothing_is_fetched(trained, fetched)
        trained.fetched.clear()
        with pytest.raises(AssertionError, match=r"load\(\) asked for weights\.invalid"):
            kit.test_nothing_is_fetched(trained, fetched)
