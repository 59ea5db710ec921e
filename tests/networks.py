"""Networks and their quantized graphs that several tests look at; each is made once."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torch import nn

from uad_plugins.models import ReverseDistillation, Stfpm, UninformedStudents
from uad_plugins.models.conditional import ConditionalNorm
from uad_plugins.quantization.calibration import calibrate
from uad_plugins.quantization.core import Core, student_parameters
from uad_plugins.quantization.export import to_onnx
from uad_plugins.quantization.quiet import quiet_quantizers
from uad_plugins.quantization.torch_quantization import quantize_core, strip

SIDE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS = ("stfpm", "gated_stfpm", "conditional_stfpm", "reverse_distillation", "uninformed_students")


def lively(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and scales of its own: an untrained one is an identity, or zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                # One factor below zero: folding has to turn the sign of a channel.
                module.weight[0].neg_()
        if isinstance(module, ConditionalNorm):
            for weight in module.scale.weight, module.shift.weight:
                nn.init.uniform_(weight, -0.5, 0.5)
            if module.means is not None and module.variances is not None:
                nn.init.uniform_(module.means, -0.1, 0.1)
                nn.init.uniform_(module.variances, 0.5, 1.5)
    return model


def students_and_teachers(pre_processor: PreProcessor) -> UninformedStudents:
    """Uninformed Students with pooling of both kinds, with a stride and dense."""
    built = UninformedStudents(
        weights="checkpoint",
        patch_sizes=(17, 33),
        width=0.125,
        stride=2,
        pre_processor=pre_processor,
        visualizer=False,
    )
    for layer in built.model.modules():
        if isinstance(layer, nn.Conv2d):
            # Larger than torch's own: descriptors that hardly differ say nothing about quantization.
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        for scale, target in enumerate(built.model.targets(images)):
            built.model.feature_mean[scale, 0] = target.mean(dim=(0, 1, 3, 4))
            built.model.feature_std[scale, 0] = target.std(dim=(0, 1, 3, 4))
        found = built.model.deviations(images)
        for kind, values in enumerate((found.errors, found.variances)):
            built.model.score_mean[:, 0, kind] = values.mean(dim=(0, 2, 3))
            built.model.score_std[:, 0, kind] = values.std(dim=(0, 2, 3))
    return built.eval()


@cache
def module(method: str) -> AnomalibModule:
    """An untrained method with lively BatchNorm; layers 1 and 2 of STFPM, two narrow scales of Uninformed Students.

    The student of gated STFPM has squeeze-and-excitation, that of conditional STFPM is told which of two products it sees.
    Not to be changed.
    """
    torch.manual_seed(0)
    pre_processor = AnomalibModule.configure_pre_processor((SIDE, SIDE))
    if method == "uninformed_students":
        return students_and_teachers(pre_processor)
    cls, options = ReverseDistillation, {}
    if method.endswith("stfpm"):
        cls, options = Stfpm, {"layers": ["layer1", "layer2"]}
    if method == "gated_stfpm":
        options["student_backbone"] = "seresnet18"
    if method == "conditional_stfpm":
        options |= {"conditional_norm": True, "products_apart": True, "categories": ["one", "other"]}
    built = cls(backbone="resnet18", weights="bundled", pre_processor=pre_processor, visualizer=False, **options)
    lively(built.model)
    return built.eval()


def core(method: str) -> Core:
    """A core of a copy of the network."""
    return Core(deepcopy(module(method))).eval().to(memory_format=torch.contiguous_format)


def students(method: str) -> set[str]:
    """Names of the student's parameters in the core."""
    return student_parameters(module(method))


def noise(count: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """Normalised random images, one a batch."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, SIDE, SIDE, generator=generator) for _ in range(count)]


@cache
def quantized(method: str, profile: str, scope: str = "all") -> nn.Module:
    """The network with fake quantizers. Not to be changed."""
    student = students(method) if scope == "student" else None
    return quantize_core(core(method), noise(), profile=profile, student=student, overflow_fix="disable")


@cache
def exported(method: str, profile: str, scope: str = "all"):
    """Its ONNX graph; profile ``float`` for the network without quantizers. Not to be changed."""
    if profile == "float":
        with quiet_quantizers():
            return to_onnx(core(method), (SIDE, SIDE))
    with quiet_quantizers():
        return to_onnx(strip(quantized(method, profile, scope), noise(1)[0]), (SIDE, SIDE))


def calibration(table, source="dataset", samples=9, size=(64, 64), **options):
    """Calibration data of a table with all its categories."""
    return calibrate(source, samples, table, table.categories, image_size=size, mean=MEAN, std=STD, **options)
