"""Fake quantizers in a torch network, placed by NNCF and then brought to the rules of a profile.

Two profiles, because OpenVINO and TensorRT want different graphs:

``openvino``  NNCF's own placement, unsigned activations behind ReLU, but for residual additions, which stay in float:
              OpenVINO does them within the convolution before, at no cost.
``tensorrt``  all signed and symmetric, on the skip branch of a residual addition only, one scale for the whole weight of a
              transposed convolution.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nncf
import nncf.torch
import torch
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.wrapper import get_hook_storage, wrap_model
from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer
from torch import nn

from uad_plugins.artifacts import atomic_path, checked
from uad_plugins.errors import UadxError
from uad_plugins.hookspecs import QuantizationRequest
from uad_plugins.quantization.bias_correction import correct_biases
from uad_plugins.quantization.equalization import SAMPLES, equalize
from uad_plugins.quantization.graph import NORM, TRANSPOSED
from uad_plugins.quantization.options import CalibrationOptions
from uad_plugins.quantization.quiet import quiet_quantizers
from uad_plugins.quantization.ranges import advanced_parameters
from uad_plugins.quantization.scope import TorchGraph

OPENVINO, TENSORRT = "openvino", "tensorrt"
BIAS_SAMPLES = 32
"""Calibration samples that biases are corrected with; products take turns among them."""
CHECKPOINT = "quantized.ckpt"
"""Weights and quantizers of a trained result."""

# NNCF compiles its quantizers when they are first used, and gives up after a minute: a slow or busy machine takes longer.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")


def hooks(model: nn.Module) -> list[tuple[str, SymmetricQuantizer]]:
    """Return the quantizers of a network by the name of their place; a shared one appears once for each place."""
    found = list(get_hook_storage(model).named_hooks(remove_duplicate=False))
    foreign = {type(hook).__name__ for _, hook in found if not isinstance(hook, SymmetricQuantizer)}
    if foreign:
        raise UadxError(f"NNCF placed {', '.join(sorted(foreign))}, which no profile knows", "use the pinned NNCF version")
    return found


def calibrated(
    request: QuantizationRequest,
    options: CalibrationOptions,
    profile: str,
    *,
    student: set[str] | None = None,
    overflow_fix: str = "disable",
) -> nn.Module:
    """Return a copy of the network with fake quantizers as the options want it: equalized, calibrated, biases corrected.

    Args:
        request: Network and calibration data. The network's channels are equalized.
        options: How.
        profile: ``openvino`` or ``tensorrt``.
        student: See ``quantize_core``.
        overflow_fix: See ``quantize_core``.
    """
    samples = [torch.from_numpy(image) for image in request.calibration]
    if options.equalize and request.calibration.paths:
        equalize(request.core, samples[:SAMPLES])
    graph = TorchGraph.of(request.core, samples[0])
    ranges = options.chosen_ranges(bool(request.calibration.paths))
    model = quantize_core(request.core, samples, profile=profile, student=student, overflow_fix=overflow_fix, ranges=ranges)
    if options.bias_correction == "full":
        correct_biases(model, request.core, graph, samples[:BIAS_SAMPLES])
    return model


def quantize_core(
    core: nn.Module,
    calibration: Sequence[torch.Tensor],
    *,
    profile: str,
    student: set[str] | None = None,
    overflow_fix: str = "first_layer",
    ranges: str = "quantile",
) -> nn.Module:
    """Return a copy of a network with fake quantizers, their ranges set by the calibration data.

    Args:
        core: Trained network in evaluation.
        calibration: Batches of one image, float32 ``(1, 3, H, W)``, normalised.
        profile: ``openvino`` or ``tensorrt``.
        student: Names of the parameters whose convolutions are quantized; None: all.
        overflow_fix: ``disable``, ``first_layer`` or ``enable``: weights of half the range, for CPUs without VNNI.
            ``tensorrt`` needs none.
        ranges: ``quantile``, ``whole`` or ``mean``; see ``advanced_parameters``.
    """
    with quiet_quantizers():
        graph = TorchGraph.of(core, calibration[0])
        additions = [addition for addition, _, _ in graph.additions()] if profile == OPENVINO else []
        quantized: nn.Module = nncf.quantize(
            core,
            nncf.Dataset(list(calibration)),
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(names=sorted({*graph.ignored(student), *additions})),
            advanced_parameters=advanced_parameters(
                ranges, "disable" if profile == TENSORRT else overflow_fix, signed=profile == TENSORRT
            ),
        )
        share_equal_inputs(quantized, graph)
        if profile == TENSORRT:
            force_signed(quantized)
            keep_skip_branch_only(quantized, graph)
            one_scale_for_transposed(quantized, graph)
    return quantized.eval()


def share_equal_inputs(model: nn.Module, graph: TorchGraph) -> None:
    """Make consumers of the same tensor use the same quantizer.

    Where a tensor also goes to the float head NNCF gives every convolution behind it a quantizer of its own. They are equal
    after calibration, and would drift apart in training.
    """
    storage, first = get_hook_storage(model), {}
    for name, hook in hooks(model):
        kind, operation, port = decode_hook_name(name)
        source = graph.inputs[operation].get(port, "")
        if kind != "pre_hooks" or source in graph.parameters or not source:
            continue
        if source not in first:
            first[source] = hook
        elif hook is not first[source] and torch.equal(hook.scale, first[source].scale):
            storage.set_submodule(name, first[source])


def force_signed(model: nn.Module) -> None:
    """Make every quantizer signed: TensorRT knows no unsigned ones. The scale keeps its meaning, the largest value."""
    for _, hook in hooks(model):
        hook.signed = True


def keep_skip_branch_only(model: nn.Module, graph: TorchGraph) -> None:
    """Delete the quantizers between the main branch of a residual block and its addition.

    TensorRT fuses convolution, addition and ReLU to one INT8 kernel only when the convolution's result reaches the addition
    as it is, and the other input quantized.
    """
    storage = get_hook_storage(model)
    unwanted: set[str] = set()
    for addition, main, _ in graph.additions():
        ports = [port for port, source in graph.inputs[addition].items() if source == main]
        unwanted |= {f"pre_hooks.{_key(addition)}__{port}.0" for port in ports}
        while len(graph.outputs.get(main, ())) == 1:
            unwanted.add(f"post_hooks.{_key(main)}__0.0")
            if graph.kinds[main] != NORM:
                break
            main = graph.inputs[main][0]
    for name, _ in hooks(model):
        if name in unwanted:
            storage.delete_hook(name)


def one_scale_for_transposed(model: nn.Module, graph: TorchGraph) -> None:
    """Give the weight of each transposed convolution one scale: TensorRT versions differ in the axis of several."""
    storage = get_hook_storage(model)
    for name, hook in hooks(model):
        _, operation, port = decode_hook_name(name)
        if port != 1 or graph.kinds.get(operation) != TRANSPOSED or hook.scale_shape == (1,):
            continue
        single = SymmetricQuantizer(
            PTQuantizerSpec(
                num_bits=hook.num_bits,
                mode=hook.get_quantizer_config().mode,
                signedness_to_force=True,
                narrow_range=hook.narrow_range,
                half_range=hook.is_half_range,
                scale_shape=(1,),
                logarithm_scale=hook.is_using_log_scale_storage,
            )
        )
        with torch.no_grad():
            single.scale.copy_(hook.scale.abs().max().reshape(1))
        storage.set_submodule(name, single)


def strip(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """Return a copy whose quantizers are torch's own, ready to be exported.

    NNCF replaces a shared quantizer at one of its places only; the others get copies first.
    """
    copy = deepcopy(model).eval()
    storage, seen = get_hook_storage(copy), set()
    for name, hook in hooks(copy):
        if id(hook) in seen:
            storage.set_submodule(name, deepcopy(hook))
        seen.add(id(hook))
    with quiet_quantizers():
        stripped: nn.Module = nncf.strip(copy, do_copy=False, example_input=example)
    return stripped


def student_scales(model: nn.Module, graph: TorchGraph, student: set[str]) -> set[str]:
    """Return the parameter names of the scales that the student's training may change.

    These are the scales of quantizers that act only on what the student computes. A quantizer that the teacher's
    convolutions see too (of the image, of a feature that both take) is part of the target, and stays.

    Args:
        model: Quantized network.
        graph: Of the float network.
        student: Names of the student's parameters.
    """
    own = graph.after(graph.convolutions_of(student))
    places: dict[int, list[bool]] = {}
    for name, hook in hooks(model):
        places.setdefault(id(hook), []).append(decode_hook_name(name)[1] in own)
    allowed = {id(parameter) for _, hook in hooks(model) if all(places[id(hook)]) for parameter in hook.parameters()}
    named = model.named_parameters()
    return {name for name, value in named if id(value) in allowed and value.is_floating_point()}


def configuration(model: nn.Module) -> str:
    """Return the places and kinds of the quantizers as JSON, for ``restore``."""
    return json.dumps(nncf.torch.get_config(model), default=str)


def restore(core: nn.Module, configured: str, state: dict[str, Any] | None = None) -> nn.Module:
    """Put quantizers into a float network as they were in the network that ``configuration`` described.

    Args:
        core: Float network; it is changed.
        configured: What ``configuration`` returned.
        state: State dict of the quantized network; None leaves the ranges unset.
    """
    with quiet_quantizers():
        restored: nn.Module = nncf.torch.load_from_config(wrap_model(core), json.loads(configured))
    if state is not None:
        restored.load_state_dict(state)
    return restored.eval()


def was_trained(details: Mapping[str, Any]) -> bool:
    """Tell from the details of a result of ``nncf-qat`` whether an epoch improved on the calibration it began with."""
    return bool(details["best_epoch"])


def _key(operation: str) -> str:
    return operation.replace(".", ":")


def save_quantized(model: nn.Module, path: Path, **facts: Any) -> None:
    """Write weights and quantizers of a network, with plain facts beside them; the module itself cannot be pickled."""
    with atomic_path(path) as temporary:
        torch.save({"state_dict": model.state_dict(), "nncf_config": configuration(model), **facts}, temporary)


def load_quantized(core: nn.Module, path: Path) -> nn.Module:
    """Restore what ``save_quantized`` wrote, bit for bit, into the float network it came from.

    Args:
        core: Float network of the same shape; it is changed.
        path: The file.

    Raises:
        UadxError: The file is missing or damaged.
    """
    content = checked(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    return restore(core, content["nncf_config"], content["state_dict"])
