"""Backbone weights: from timm's hub, from the package, or from a local file; never silently random.

anomalib builds its backbones through ``timm.create_model(NAME, pretrained=True)``. ``alias`` registers with timm, by its
public ``register_model``, a second name for an architecture whose ``pretrained=True`` takes the weights chosen here.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from torch import nn

from uad_plugins.errors import UadxError, reason_of, unknown_name

HUB, BUNDLED, CHECKPOINT = "hub", "bundled", "checkpoint"
"""Sources besides a path. ``checkpoint``: the weights come with the checkpoint that is being loaded."""

BUNDLED_ARCHITECTURE = "resnet18"
BUNDLED_FILE = Path(__file__).parent / "assets" / "resnet18_layer3.safetensors"
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
ELSEWHERE = "--weights FILE_OR_FOLDER with a timm or torchvision state dict, or --weights hub on a machine with a network"
WAYS_OUT = f"--weights bundled (resnet18 up to layer3, ships with uadx), {ELSEWHERE}"


@dataclass(frozen=True)
class WeightsRecord:
    """Where backbone weights came from.

    Attributes:
        source: ``hub``, ``bundled`` or ``file``.
        architecture: timm name of the backbone.
        origin: File name or hub identifier.
        sha256: Of the file; for hub weights, of the tensors in the order of their names.
    """

    source: str
    architecture: str
    origin: str
    sha256: str


LICENCES = {BUNDLED: "Apache-2.0, see NOTICE of uadx"}
UNKNOWN_LICENCE = "not known to uadx: ask whoever provided the weights"


def with_licence(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the record of a run's backbone weights with their licence, where it is known; empty without a record."""
    if not record:
        return {}
    licence = LICENCES.get(str(record.get("source")))
    if record.get("source") == HUB:
        entry = timm.get_pretrained_cfg(str(record.get("origin")).rpartition("/")[2])
        licence = str(entry.license) if entry is not None and entry.license else None
    return {**record, "licence": licence or UNKNOWN_LICENCE}


_source: ContextVar[str | None] = ContextVar("backbone_weights", default=None)
_records: ContextVar[list[WeightsRecord] | None] = ContextVar("backbone_records", default=None)


@contextmanager
def backbone_weights(source: str) -> Iterator[list[WeightsRecord]]:
    """Choose the weights that aliased backbones are built with inside the ``with`` block.

    Yields:
        The list to which a record of each backbone loaded is added.
    """
    records: list[WeightsRecord] = []
    tokens = _source.set(source), _records.set(records)
    try:
        yield records
    finally:
        _source.reset(tokens[0])
        _records.reset(tokens[1])


def architectures() -> list[str]:
    """Return the names of timm's plain ResNets: stem, then ``layer1`` to ``layer4``."""
    return [name for name in timm.list_models(module="resnet") if not name.startswith("uadx_")]


def require_architecture(name: str, known: list[str] | None = None) -> str:
    """Return the name without timm's weight tag after checking that it is one of ``known``.

    Raises:
        UsageError: It is not; the message has the nearest name.
    """
    known = architectures() if known is None else known
    bare = name.partition(".")[0]
    if bare not in known:
        error = unknown_name("backbone", name, known)
        if len(known) > 20:
            error.hint = f"{error.hint.partition('known:')[0]}any timm ResNet, for example resnet18, wide_resnet50_2"
        raise error
    return bare


def alias(architecture: str) -> str:
    """Register the second name of an architecture, and of its weights where they are tagged, with timm and return it."""
    bare = architecture.partition(".")[0]
    name = f"uadx_{architecture.replace('.', '_')}"
    if not timm.is_model(name):

        def build(pretrained: bool = False, **options: Any) -> nn.Module:
            for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
                options.pop(unused, None)
            model: nn.Module = timm.create_model(bare, pretrained=False, **options)
            source = _source.get()
            if pretrained and source != CHECKPOINT:
                if source is None:
                    raise UadxError(f"{name}: no weights chosen", "build it inside uad_plugins.models.backbone_weights")
                load_backbone(model, architecture, source)
            return model

        build.__name__ = build.__qualname__ = name
        build.__module__ = __name__
        timm.models.register_model(build)
    return name


def load_backbone(module: nn.Module, architecture: str, source: str) -> WeightsRecord:
    """Load weights into a timm backbone (whole, or cut by ``features_only``).

    Args:
        module: The backbone; every parameter and buffer of it must be in the weights.
        architecture: timm name, with or without weight tag.
        source: ``hub``, ``bundled``, or the path of a file or folder.

    Raises:
        UadxError: The weights are missing, are of another architecture, or lack a layer.
    """
    bare = architecture.partition(".")[0]
    if source == HUB:
        state, record = _from_hub(architecture)
    elif source == BUNDLED:
        if bare != BUNDLED_ARCHITECTURE:
            ways = f"--backbone {BUNDLED_ARCHITECTURE}, {ELSEWHERE}"
            raise UadxError(f"the bundled weights are of {BUNDLED_ARCHITECTURE}, not {bare}", ways)
        state, record = _from_file(BUNDLED_FILE, bare, BUNDLED)
    else:
        state, record = _from_file(_find_file(Path(source).expanduser(), bare), bare, "file")
    _fill(module, state, bare, record)
    records = _records.get()
    if records is not None:
        records.append(record)
    return record


def require_hub(architecture: str) -> None:
    """Fail at once where the hub cannot be reached and has not been cached: its client would retry for a minute.

    Raises:
        UadxError: The message has the ways out.
    """
    identifier = (timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()).hf_hub_id
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    if not identifier or proxied or host is None:
        return
    cached = (
        huggingface_hub.try_to_load_from_cache(identifier, name) for name in ("model.safetensors", "pytorch_model.bin")
    )
    if any(isinstance(path, str) for path in cached):
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise UadxError(f"weights of {architecture} cannot be fetched: no network ({host})", WAYS_OUT) from error


def _from_hub(architecture: str) -> tuple[dict[str, torch.Tensor], WeightsRecord]:
    require_hub(architecture)
    try:
        model = timm.create_model(architecture, pretrained=True)
    except Exception as error:
        # The hub client, its transport and timm each raise their own kinds.
        reason = reason_of(error)
        raise UadxError(f"weights of {architecture} cannot be fetched from timm's hub: {reason}", WAYS_OUT) from error
    return model.state_dict(), hub_record(model, architecture)


def hub_record(model: nn.Module, architecture: str) -> WeightsRecord:
    """Describe weights that timm has fetched into a backbone."""
    state = model.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].cpu().contiguous().numpy().tobytes())
    cfg = getattr(model, "pretrained_cfg", None) or {}
    origin = str(cfg.get("hf_hub_id") or cfg.get("url") or architecture)
    return WeightsRecord(HUB, architecture, origin, digest.hexdigest())


def _find_file(path: Path, architecture: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UadxError(f"{path}: no such file or folder of backbone weights", WAYS_OUT)
    stems = (architecture, "model", "pytorch_model")
    exact = [path / f"{stem}{ending}" for stem in stems for ending in ENDINGS]
    loose = sorted(
        file
        for file in path.iterdir()
        if file.suffix in ENDINGS and file.stem.startswith((f"{architecture}.", f"{architecture}-", f"{architecture}_"))
    )
    found = next((file for file in [*exact, *loose] if file.is_file()), None)
    if found is None:
        raise UadxError(f"{path}: no weights of {architecture}", f"expected {architecture}.safetensors or .pth; {WAYS_OUT}")
    return found


def _from_file(path: Path, architecture: str, source: str) -> tuple[dict[str, torch.Tensor], WeightsRecord]:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state: Any = load(data)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = reason_of(error)
        raise UadxError(f"{path}: not a readable state dict: {reason}", WAYS_OUT) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UadxError(f"{path}: not a state dict (names to tensors)", WAYS_OUT)
    tensors = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return tensors, WeightsRecord(source, architecture, path.name, digest)


def _fill(module: nn.Module, state: Mapping[str, torch.Tensor], architecture: str, record: WeightsRecord) -> None:
    """Load what the module has; refuse weights that lack a part of it or belong to another architecture."""
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise UadxError(
            f"{record.origin}: lacks {len(missing)} tensors of {architecture}, for example {missing[0]}",
            f"use a whole {architecture}, or fewer layers; {WAYS_OUT}",
        )
    with torch.device("meta"):
        whole = timm.create_model(architecture, pretrained=False).state_dict()
    foreign = [name for name in state if name not in whole]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if foreign or wrong:
        raise UadxError(
            f"{record.origin}: weights of another architecture than {architecture} ({(wrong or foreign)[0]})", WAYS_OUT
        )
    module.load_state_dict({n: state[n].to(own[n].dtype) if n in state else own[n] for n in own})
