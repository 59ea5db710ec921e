"""Backbone weights: bundled, from files, never silently random."""

import hashlib

import pytest
import timm
import torch
from safetensors.torch import save_file

from uad_plugins.errors import UadxError, UsageError
from uad_plugins.models import backbones
from uad_plugins.models.backbones import (
    BUNDLED_FILE,
    CHECKPOINT,
    alias,
    backbone_weights,
    load_backbone,
    require_architecture,
)


def cut(layers=(1, 2, 3), name="resnet18"):
    return timm.create_model(name, pretrained=False, features_only=True, out_indices=layers)


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    return timm.create_model("resnet18", pretrained=False).state_dict()


def test_the_bundled_weights_are_loaded_and_recorded():
    module = cut()
    record = load_backbone(module, "resnet18", "bundled")
    assert (record.source, record.architecture, record.origin) == ("bundled", "resnet18", "resnet18_layer3.safetensors")
    assert record.sha256 == hashlib.sha256(BUNDLED_FILE.read_bytes()).hexdigest()
    other = cut()
    load_backbone(other, "resnet18", "bundled")
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True))
    assert float(module.state_dict()["layer3.1.bn2.weight"].abs().sum()) > 0


@pytest.mark.parametrize("name", ["resnet18.safetensors", "resnet18.pth", "model.safetensors", "resnet18-f37072fd.pth"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_weights_come_from_a_file_or_the_folder_it_lies_in(tmp_path, whole, name, as_folder):
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(whole, path)
    else:
        torch.save(whole, path)
    module = cut()
    record = load_backbone(module, "resnet18", str(tmp_path if as_folder else path))
    assert (record.source, record.origin) == ("file", name)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(module.state_dict()["layer2.0.conv1.weight"], whole["layer2.0.conv1.weight"])


@pytest.mark.parametrize(
    "wrapped", [lambda s: {"state_dict": s}, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}]
)
def test_the_usual_wrappings_are_understood(tmp_path, whole, wrapped):
    torch.save(wrapped(whole), tmp_path / "w.pth")
    module = cut()
    load_backbone(module, "resnet18", str(tmp_path / "w.pth"))
    assert torch.equal(module.state_dict()["conv1.weight"], whole["conv1.weight"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, whole: None, "no such file or folder of backbone weights"),
        (lambda path, whole: path.mkdir(), "no weights of resnet18"),
        (lambda path, whole: path.write_bytes(b"garbage"), "not a readable state dict"),
        (lambda path, whole: torch.save([1, 2], path), "not a state dict"),
        (lambda path, whole: torch.save({k: v for k, v in whole.items() if "layer3" not in k}, path), "lacks 25 tensors"),
        (lambda path, whole: torch.save({**whole, "layer1.2.conv1.weight": torch.zeros(1)}, path), "another architecture"),
        (lambda path, whole: torch.save({**whole, "conv1.weight": torch.zeros(64, 3, 3, 3)}, path), "another architecture"),
    ],
)
def test_missing_or_mismatched_weights_name_the_ways_out(tmp_path, whole, make, message):
    path = tmp_path / "weights.pth"
    make(path, whole)
    with pytest.raises(UadxError, match=message) as error:
        load_backbone(cut(), "resnet18", str(path))
    for way in ("--weights bundled", "--weights FILE_OR_FOLDER", "--weights hub"):
        assert way in error.value.hint


@pytest.mark.parametrize(
    ("name", "layers", "message"), [("resnet34", (1, 2), "of resnet18, not resnet34"), ("resnet18", (1, 4), "lacks")]
)
def test_the_bundled_weights_do_for_resnet18_up_to_layer3_alone(name, layers, message):
    with pytest.raises(UadxError, match=message) as error:
        load_backbone(cut(layers, name), name, "bundled")
    if name != "resnet18":
        assert error.value.hint.startswith("--backbone resnet18, --weights FILE_OR_FOLDER")


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"a": Evil()}, tmp_path / "evil.pth", pickle_protocol=2)
    with pytest.raises(UadxError, match="not a readable state dict"):
        load_backbone(cut(), "resnet18", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "made").exists()


def test_the_hub_that_cannot_be_reached_fails_at_once(monkeypatch):
    def no_network(*_args):
        raise OSError("no network")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backbones.socket, "getaddrinfo", no_network)
    monkeypatch.setattr(backbones.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UadxError, match="no network") as error:
        load_backbone(cut(), "resnet18", "hub")
    assert "--weights bundled" in error.value.hint


def test_an_aliased_backbone_takes_the_chosen_weights():
    name = alias("resnet18")
    assert (name, timm.is_model(name)) == ("uadx_resnet18", True)
    with backbone_weights("bundled") as records:
        module = timm.create_model(name, pretrained=True, pretrained_cfg=None, features_only=True, out_indices=(1, 2, 3))
    assert [record.source for record in records] == ["bundled"]
    reference = cut()
    load_backbone(reference, "resnet18", "bundled")
    assert torch.equal(module.state_dict()["conv1.weight"], reference.state_dict()["conv1.weight"])


def test_the_hubs_weights_are_loaded_and_recorded(monkeypatch):
    """timm's own function stands in for the hub: as the run sees it, weights that were fetched."""
    create, fetched = timm.create_model, []

    def from_the_hub(name, pretrained=False, **options):
        torch.manual_seed(0)
        model = create(name, **options)
        if pretrained:
            fetched.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", from_the_hub)
    monkeypatch.setattr(backbones, "require_hub", lambda _: None)
    module = cut()
    record = load_backbone(module, "resnet18.a1_in1k", "hub")
    (model,) = fetched
    assert torch.equal(module.state_dict()["layer2.0.conv1.weight"], model.state_dict()["layer2.0.conv1.weight"])
    assert (record.source, record.architecture, record.origin) == ("hub", "resnet18.a1_in1k", "timm/resnet18.a1_in1k")
    other = load_backbone(cut(), "resnet18.tv_in1k", "hub")
    assert (other.origin, other.sha256) == ("timm/resnet18.tv_in1k", record.sha256), "of the weights alone"


def test_an_alias_keeps_to_its_own_weight_tag(monkeypatch):
    asked = []
    monkeypatch.setattr(backbones, "load_backbone", lambda module, architecture, source: asked.append(architecture))
    names = [alias(name) for name in ("resnet18.a1_in1k", "resnet18.tv_in1k", "resnet18")]
    with backbone_weights("hub"):
        for name in names:
            timm.create_model(name, pretrained=True)
    assert asked == ["resnet18.a1_in1k", "resnet18.tv_in1k", "resnet18"]


def test_an_aliased_backbone_is_never_silently_random():
    with pytest.raises(UadxError, match="no weights chosen"):
        timm.create_model(alias("resnet18"), pretrained=True)
    with backbone_weights(CHECKPOINT) as records:
        timm.create_model(alias("resnet18"), pretrained=True)
    assert records == []


def test_unknown_backbones_are_answered_with_the_nearest():
    with pytest.raises(UsageError) as error:
        require_architecture("resnet81")
    assert error.value.message == "unknown backbone 'resnet81'"
    assert "did you mean 'resnet18'?" in error.value.hint
    assert require_architecture("resnet18.a1_in1k") == "resnet18"
