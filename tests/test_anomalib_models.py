"""anomalib's other models, as ``anomalib:CLASS``: what they are given, and what is refused before anything is written."""

import shutil
import socket
from pathlib import Path

import pytest
from runs import small_config, small_run

from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models import anomalib_models
from uad_plugins.models.backbones import WAYS_OUT

# anomalib's own, of a class of torchvision.
pytestmark = pytest.mark.filterwarnings("ignore:The transform `ToTensor")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No name is resolved, and nothing is in the hub's cache."""

    def refuse(*_args, **_options):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def named(name, **over):
    # Without the batch size and the backbone of the small configuration.
    return small_config(
        {"model": {"name": f"anomalib:{name}", "backbone": None, "weights": "hub", **over.pop("model", {})}, **over}
    )


@pytest.mark.parametrize("name", ["Padim", "Stfpm", "Cflow"])
def test_without_a_network_the_ways_out_are_named(offline, name):
    with pytest.raises(UadxError) as error:
        anomalib_models.build(named(name, model={"backbone": "resnet18"}))
    assert error.value.message.startswith("weights of resnet18 cannot be fetched: no network (")
    assert error.value.hint == WAYS_OUT


def test_a_random_backbone_is_refused():
    with pytest.raises(UsageError) as error:
        anomalib_models.build(named("Padim", model={"options": {"pre_trained": False}}))
    assert error.value.message == "model.options.pre_trained=false would train on random weights"
    given = {"backbone": "resnet18", "weights": "bundled", "options": {"pre_trained": False}}
    _, records = anomalib_models.build(named("Padim", model=given))
    assert [record.source for record in records] == ["bundled"]


def efficient_ad(**data):
    return named("EfficientAd", data={"train_batch_size": 1, **data})


def test_a_method_for_single_images_refuses_batches():
    with pytest.raises(UsageError) as error:
        anomalib_models.build(efficient_ad(train_batch_size=8))
    assert error.value.message == "anomalib:EfficientAd is trained with one image at a time, not 8"


@pytest.fixture
def fetched(monkeypatch):
    """Downloads fail as anomalib's do without a network: after the folder was made."""
    module = "anomalib.models.image.efficient_ad.lightning_model"

    def fail(root, info):
        root.mkdir(parents=True)
        raise OSError("no route to host")

    monkeypatch.setattr(f"{module}.download_and_extract", fail)
    return module


def test_what_cannot_be_fetched_is_said_before_an_old_run_is_touched(products, trained, tmp_path, monkeypatch, fetched):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    over = {"model": {"name": "anomalib:EfficientAd", "backbone": None, "weights": "hub"}, "data": {"train_batch_size": 1}}
    monkeypatch.setattr(f"{fetched}.get_pretrained_weights_dir", lambda: tmp_path / "weights")
    with pytest.raises(UadxError, match="EfficientAd cannot get its pretrained weights: no route to host"):
        small_run(products, run, over, overwrite=True)
    monkeypatch.setattr(f"{fetched}.EfficientAd.prepare_pretrained_model", lambda self: None)
    for _ in range(2):
        with pytest.raises(UadxError) as error:
            small_run(products, run, over, overwrite=True)
        assert error.value.message == (
            "anomalib:EfficientAd cannot get the natural images that it trains with in datasets/imagenette: no route to host"
        )
        assert error.value.hint.endswith("--set model.options.imagenet_dir=FOLDER")
        assert not Path("datasets/imagenette").exists()
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.slow
def test_efficient_ad_trains(products, tmp_path, monkeypatch, fetched):
    monkeypatch.setattr(f"{fetched}.EfficientAd.prepare_pretrained_model", lambda self: None)
    over = {
        "model": {
            "name": "anomalib:EfficientAd",
            "backbone": None,
            "weights": "hub",
            "options": {"imagenet_dir": str(products / "fabric" / "train")},
        },
        "data": {"train_batch_size": 1, "image_size": 256, "categories": ["fabric"], "samples_per_epoch": 2},
        "trainer": {"max_epochs": 1},
    }
    assert small_run(products, tmp_path / "run", over)["samples_seen"] == 2
