"""``nncf-qat``: the quantized student is trained against the quantized teacher that will be deployed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from anomalib import LearningType
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn, optim

from uad_plugins.artifacts import read_json, write_json
from uad_plugins.config import OptimizerConfig, model_plugin
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.errors import UadxError
from uad_plugins.hookspecs import QuantizationRequest, QuantizationResult
from uad_plugins.models.augmentation import augmentation
from uad_plugins.models.recipe import learning_rate_factor
from uad_plugins.quantization.core import Preprocessing, build_core, recalibrate, student_parameters
from uad_plugins.quantization.export import save_onnx, save_openvino, to_onnx, to_openvino
from uad_plugins.quantization.onnx_graph import with_int8_weights
from uad_plugins.quantization.openvino_int8 import chosen_fix
from uad_plugins.quantization.options import QatOptions
from uad_plugins.quantization.quiet import quiet_quantizers
from uad_plugins.quantization.scope import TorchGraph
from uad_plugins.quantization.torch_quantization import (
    CHECKPOINT,
    OPENVINO,
    TENSORRT,
    calibrated,
    configuration,
    load_quantized,
    restore,
    save_quantized,
    strip,
    student_scales,
    was_trained,
)
from uad_plugins.registry import installed
from uad_plugins.training.callbacks import FiniteLoss, HeldOutLoss, SampleCount, TrainingProgress
from uad_plugins.training.checkpointing import MONITOR, AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from uad_plugins.training.quiet import quiet_libraries
from uad_plugins.training.signals import child_signal_restored
from uad_plugins.training.train import datamodule, pixel_cache

SCHEDULE = OptimizerConfig(name="adam", schedule="cosine")
BATCHNORM_MOMENTUM = 0.01
"""Share of a batch in the running statistics where they move: a tenth of torch's own, a short training has few batches."""


class RelativeAdam(optim.Adam):
    """Adam whose groups with ``relative`` step by shares of each value, not by amounts.

    Adam steps by its learning rate whatever the gradient. Ranges of weights are parts of 1, those of activations go into the
    hundreds: one rate for both would train the first alone.
    """

    def step(self, closure: Any = None) -> Any:
        """Take a step; see ``torch.optim.Optimizer.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values = [value for group in self.param_groups if group.get("relative") for value in group["params"]]
        before = [value.detach().clone() for value in values]
        with torch.no_grad():
            for value in values:
                # So that the step itself is known: in the difference of large values it would be lost to rounding.
                value.zero_()
            super().step()
            for value, old in zip(values, before, strict=True):
                value.copy_(old + value * old.abs())
        return loss


def map_distance(maps: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return how far each map is from the one expected, as a share of that: the squared relative L2 distance.

    Args:
        maps: float32 ``(B, H, W)``.
        expected: Of the same shape.

    Returns:
        float32 ``(B,)``.
    """
    tiny = torch.finfo(expected.dtype).tiny
    return (maps - expected).square().sum(dim=(1, 2)) / expected.square().sum(dim=(1, 2)).clamp(min=tiny)


class QatModule(LightningModule):
    """Trains the weights and scales of a quantized student.

    Args:
        core: Quantized ``Core``.
        student: Names of the student's parameters in it.
        scales: Names of the student's scales in it; the teacher's stay as calibrated, or the target would move.
        preprocessing: Normalisation of images in 0..1.
        options: Loss, learning rates and the like.
        reference: ``Core`` in float, whose maps are to be met; needed by loss ``maps``.

    Attributes:
        held_out_loss: float32 ``(B,)``, the loss of each image of the last validation batch.
    """

    # What anomalib's checkpoint callback asks of a module.
    learning_type = LearningType.ONE_CLASS

    def __init__(
        self,
        core: nn.Module,
        student: set[str],
        scales: set[str],
        preprocessing: Preprocessing,
        options: QatOptions,
        reference: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.core = core
        # In a tuple, so that it is no part of this module: it is neither trained nor saved.
        self._reference = () if reference is None else (reference.eval(),)
        self.options = options
        self.student, self.scales = student, scales
        self.held_out_loss: torch.Tensor | None = None
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(3, 1, 1), persistent=False)
        for name, parameter in core.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in student or name in scales)
        self.normalizations = [
            layer
            for name, layer in core.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in student
        ]
        for layer in self.normalizations if not options.freeze_batchnorm else ():
            layer.momentum = BATCHNORM_MOMENTUM

    @property
    def statistics_move(self) -> bool:
        """Whether the student's BatchNorm learns now: in the last of several epochs it rests, as deployed."""
        return not self.options.freeze_batchnorm and self.current_epoch < max(1, self.options.epochs - 1)

    def losses(self, images: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Return the loss of each image.

        Args:
            images: float32 ``(B, 3, H, W)`` in 0..1.
            training: Let the student's BatchNorm learn, while its statistics move.
        """
        self.core.eval()
        # Of the outermost module alone: it decides what is returned, the network itself stays in evaluation.
        self.core.training = True
        if training and self.statistics_move:
            for layer in self.normalizations:
                layer.train()
        images = (images - self.mean) / self.std
        losses: torch.Tensor
        losses, maps = self.core(images)
        for reference in self._reference:
            with torch.no_grad():
                expected = reference.to(images.device)(images)[1]
            losses = map_distance(maps, expected)
        return losses

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the mean loss of a batch."""
        del args, kwargs
        return self.losses(batch.image, training=True).mean()

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> None:
        """Note the loss of each image in ``held_out_loss``."""
        del args, kwargs
        self.held_out_loss = self.losses(batch.image, training=False)

    def configure_optimizers(self) -> Any:
        """Return Adam with a group for the weights and one for the scales, which steps by shares, and a cosine over all."""
        named = dict(self.core.named_parameters())
        groups = [
            {
                "params": [named[name] for name in sorted(self.student) if name in named],
                "lr": self.options.lr,
                "weight_decay": self.options.weight_decay,
            },
            {
                "params": [named[name] for name in sorted(self.scales)],
                "lr": self.options.scale_lr,
                # Decay would shrink the ranges of the activations.
                "weight_decay": 0.0,
                "relative": True,
            },
        ]
        optimizer = RelativeAdam(groups)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(SCHEDULE, step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the places of the quantizers: ``restore`` needs them."""
        checkpoint["nncf_config"] = configuration(self.core)


def quantize(request: QuantizationRequest) -> QuantizationResult:
    """Calibrate, train, and write ``quantized.ckpt``, ``model.onnx`` and, for OpenVINO, ``model.xml``."""
    options: QatOptions = request.options
    work = request.folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    student = student_parameters(request.module)
    example = torch.zeros(1, 3, *request.image_size)
    graph = TorchGraph.of(request.core, example)
    fix = "disable" if options.profile == TENSORRT else chosen_fix(options.overflow_fix)
    start = work / "start.ckpt"
    if request.resume and start.is_file():
        core = load_quantized(request.core, start)
    else:
        core = calibrated(
            request, options, options.profile, student=student if options.scope == "student" else None, overflow_fix=fix
        )
        save_quantized(core, start)
    scales = student_scales(core, graph, student)
    preprocessing = Preprocessing(request.calibration.mean, request.calibration.std)
    reference = _fresh(request) if options.loss == "maps" else None
    trained = _train(request, QatModule(core, student, scales, preprocessing, options, reference))
    core = trained.pop("core")
    recalibrate(request.module, core, map(torch.from_numpy, request.calibration.held_out(request.table)))
    save_quantized(core, request.folder / CHECKPOINT, profile=options.profile)
    files = [*_export(request, core, options), CHECKPOINT]
    details = {**trained, "overflow_fix": fix, "student_tensors": len(student), "student_scales": len(scales)}
    whole = options.scope == "all"
    return QuantizationResult(files, "int8", options.profile, whole=whole, trained=was_trained(details), details=details)


def _train(request: QuantizationRequest, module: QatModule) -> dict[str, Any]:
    """Train, and return the best network with figures; the start, if no epoch improved on it."""
    options, work = module.options, request.folder / "work"
    config = request.config.model_copy(deep=True)
    if options.batch_size is not None:
        config.data.train_batch_size = options.batch_size
    seed_everything(request.seed, workers=True, verbose=False)
    data = datamodule(config, request.table.root)
    data.table = request.table
    cache = pixel_cache(work / "pixels", config, data.table)
    best, last = work / "best.ckpt", work / "last.ckpt"
    with quiet_libraries(), quiet_quantizers(), child_signal_restored():
        try:
            data.verify_images(None, cache, keep_split=True)
            before = _held_out(request, module, data)
            held_out, seen = _fit(request, module, data)
        finally:
            if cache is not None:
                cache.remove()
    figures = {
        "epochs": options.epochs,
        "best_epoch": held_out.best["epoch"],
        "held_out_loss": held_out.best["val_loss"],
        "held_out_loss_calibrated": before,
        "seconds": round(seen.seconds, 1),
        "samples_seen": seen.seen,
    }
    reached = held_out.best["val_loss"]
    if reached is None or (before is not None and before <= reached):
        return {**figures, "best_epoch": 0, "core": load_quantized(_fresh(request), work / "start.ckpt")}
    content = torch.load(best if best.is_file() else last, map_location="cpu", weights_only=False)
    return {**figures, "core": restore(_fresh(request), content["nncf_config"], _inner(content["state_dict"]))}


def _fit(request: QuantizationRequest, module: QatModule, data: UnifiedDataModule) -> tuple[HeldOutLoss, SampleCount]:
    work, options = request.folder / "work", module.options
    held_out, seen = HeldOutLoss(data.categories), SampleCount()
    last = work / "last.ckpt"
    trainer = Trainer(
        **_trainer(options),
        max_epochs=options.epochs,
        default_root_dir=work,
        callbacks=[
            seen,
            held_out,
            *augmentation(request.config.augmentation),
            FiniteLoss("lower lr"),
            TrainingProgress(),
            BestCheckpoint(work / "best.ckpt"),
            LastCheckpoint(last),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last if request.resume and last.is_file() else None)
    except SystemExit as stop:
        # Lightning leaves the process by itself on Ctrl-C, without a word.
        raise UadxError("training was interrupted", "continue it with --resume", exit_code=130) from stop
    return held_out, seen


def _held_out(request: QuantizationRequest, module: QatModule, data: UnifiedDataModule) -> float | None:
    """Return the held-out loss of the network as it was calibrated."""
    path = request.folder / "work" / "start.json"
    if request.resume and path.is_file():
        known: float | None = read_json(path)["val_loss"]
        return known
    watch = HeldOutLoss(data.table.categories)
    trainer = Trainer(**_trainer(module.options), callbacks=[watch], enable_checkpointing=False)
    trainer.validate(module, datamodule=data, verbose=False)
    value = trainer.callback_metrics.get(MONITOR)
    loss = float(value) if value is not None and bool(torch.isfinite(value)) else None
    write_json(path, {"val_loss": loss})
    return loss


def _trainer(options: QatOptions) -> Mapping[str, Any]:
    return {
        "accelerator": options.accelerator,
        "devices": 1,
        "deterministic": "warn",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "logger": False,
        "num_sanity_val_steps": 0,
    }


def _fresh(request: QuantizationRequest) -> nn.Module:
    """Return the float network of the run anew."""
    module = model_plugin(request.config.model.name).load(request.run.checkpoint, request.config)
    return build_core(module, request.image_size)


def _inner(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of the core from that of the module around it."""
    return {name.removeprefix("core."): value for name, value in state.items() if name.startswith("core.")}


def _export(request: QuantizationRequest, core: nn.Module, options: QatOptions) -> list[str]:
    example = torch.zeros(1, 3, *request.image_size)
    model = to_onnx(strip(core, example), request.image_size)
    weights = options.weights or ("int8" if options.profile == OPENVINO else "float32")
    if weights == "int8":
        model = with_int8_weights(model)
    path = save_onnx(model, request.folder / "model.onnx")
    files = ["model.onnx"]
    if options.profile == OPENVINO and installed("openvino"):
        save_openvino(to_openvino(path), request.folder / "model.xml")
        files += ["model.xml", "model.bin"]
    return files
