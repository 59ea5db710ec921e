"""Networks and their quantized graphs that several tests look at; each is made once."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from torch import nn
from torch.nn import functional as F

from uad_plugins.models import ReverseDistillation, Stfpm
from uad_plugins.quantization.calibration import calibrate
from uad_plugins.quantization.core import Core, student_parameters
from uad_plugins.quantization.export import to_onnx
from uad_plugins.quantization.quiet import quiet_quantizers
from uad_plugins.quantization.torch_quantization import quantize_core, strip

SIDE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS = ("stfpm", "reverse_distillation", "patches")


class Patches(nn.Module):
    """Valid convolutions, max-pools of stride 1 made of slices, and one group a student."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first = nn.Conv2d(3, 8 * groups, 5)
        self.second = nn.Conv2d(8 * groups, 8 * groups, 3, dilation=2, groups=groups)
        self.third = nn.Conv2d(8 * groups, 4 * groups, 1, groups=groups)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.leaky_relu(self.first(images), 5e-3)
        features = torch.maximum(features[..., :-1, :], features[..., 1:, :])
        features = torch.maximum(features[..., :-1], features[..., 1:])
        return self.third(F.leaky_relu(self.second(features), 5e-3))


class PatchNetwork(nn.Module):
    """A teacher and three students in one, as a third party might write them: the head has buffers, no names are ours."""

    def __init__(self) -> None:
        super().__init__()
        self.old, self.young = Patches(1).requires_grad_(False), Patches(3)
        self.register_buffer("centre", torch.randn(1, 4, 1, 1))
        self.register_buffer("spread", torch.rand(1, 4, 1, 1) + 0.5)

    def errors(self, images: torch.Tensor) -> torch.Tensor:
        target = (self.old(images).detach() - self.centre) / self.spread
        guesses = self.young(images).unflatten(1, (3, 4))
        return (guesses.mean(dim=1) - target).square().sum(dim=1, keepdim=True)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        anomaly_map = F.interpolate(self.errors(images), size=images.shape[-2:], mode="bilinear")
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)


def patches_distil(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    errors = network.errors(images)
    return errors.flatten(1).mean(dim=1), F.interpolate(errors, size=images.shape[-2:], mode="bilinear")


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
    return model


@cache
def module(method: str) -> AnomalibModule | SimpleNamespace:
    """An untrained method with lively BatchNorm; layers 1 and 2 of STFPM. Not to be changed."""
    torch.manual_seed(0)
    if method == "patches":
        return SimpleNamespace(model=PatchNetwork().eval())
    options = {"layers": ["layer1", "layer2"]} if method == "stfpm" else {}
    cls = Stfpm if method == "stfpm" else ReverseDistillation
    pre_processor = AnomalibModule.configure_pre_processor((SIDE, SIDE))
    built = cls(backbone="resnet18", weights="bundled", pre_processor=pre_processor, visualizer=False, **options)
    lively(built.model)
    return built.eval()


def core(method: str) -> Core:
    """A core of a copy of the network."""
    from copy import deepcopy

    found = Core(deepcopy(module(method))).eval()
    if method == "patches":
        found.distil = patches_distil
    return found.to(memory_format=torch.contiguous_format)


def students(method: str) -> set[str]:
    """Names of the student's parameters in the core."""
    if method == "patches":
        return {f"network.young.{name}" for name, _ in module(method).model.young.named_parameters()}
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
