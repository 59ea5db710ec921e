"""``train``: from a configuration and a folder of images to a run on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from anomalib.models import AnomalibModule
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from uad_plugins.artifacts import MANIFEST, Run, RunManifest, sha256_of, versions, write_json
from uad_plugins.config import TrainConfig, model_plugin, ratio_scale
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.data.layouts import left_out
from uad_plugins.data.pixel_cache import PixelCache
from uad_plugins.data.samples import (
    ANOMALOUS,
    NORMAL,
    SPLITS,
    SampleTable,
    from_category,
    held_out_of,
    hold_out_as_before,
    trained_categories,
)
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.thresholds import BEST_F1, thresholds_from_samples
from uad_plugins.models.augmentation import augmentation
from uad_plugins.models.backbones import CHECKPOINT, WAYS_OUT
from uad_plugins.models.recipe import DistillationRecipe
from uad_plugins.models.specialists import Specialists
from uad_plugins.models.torch_detector import TorchDetector
from uad_plugins.progress import Progress
from uad_plugins.training.arguments import check_trainer_arguments, check_trainer_can_be_built, fit_trainer_arguments
from uad_plugins.training.callbacks import FiniteLoss, HeldOutLoss, SampleCount, TrainingProgress
from uad_plugins.training.checkpointing import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, epochs_of
from uad_plugins.training.quiet import quiet_libraries
from uad_plugins.training.run_folder import (
    cache_path,
    check_epochs,
    check_folder,
    check_same_data,
    check_same_specialists,
    locked,
    main_process,
    own_place,
    resumed_config,
    write_start,
)
from uad_plugins.training.signals import child_signal_restored

OWN_OPTIMIZER = "the method brings its own optimizer: lower its learning rate in model.options, if it takes one"
"""What to do about a loss that becomes infinite where ``optimizer`` is not used."""


def train(
    config: TrainConfig,
    data: str | Path,
    out: Path,
    *,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    interactive: bool | None = None,
    verifying: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Train one model on all categories of a data set and write the run.

    Args:
        config: Resolved configuration.
        data: Folder or index file.
        out: The run's folder.
        given: What the user set explicitly; a resumed training refuses to change it. None: nothing.
        resume: Continue an unfinished training (or train a finished one on, for more epochs).
        overwrite: Replace what is there.
        interactive: Show a progress bar; None decides by the terminal.
        verifying: Called while the images are verified.
        tell: Called with a line about images that are left out, or that specialists have seen.

    Returns:
        The content of ``metrics.json``; None in the helper processes of a training on several devices.

    Raises:
        UadxError: Data, weights, folder or configuration do not allow it; see the message.
    """
    check_trainer_arguments(config.trainer)
    run = Run(own_place(out))
    with locked(run.folder), quiet_libraries(), child_signal_restored():
        check_folder(run, resume=resume, overwrite=overwrite)
        resuming = resume and (run.folder / MANIFEST).is_file()
        resumes = resuming and run.last_checkpoint.is_file()
        if resuming:
            config = resumed_config(run, given or {}, config)
        if resume and not resuming and tell is not None and main_process():
            tell(f"note: there is nothing to resume in {run.folder}: the training begins anew")
        if config.model.weights == CHECKPOINT:
            raise UadxError("model.weights: 'checkpoint' stands for those of a training that goes on", WAYS_OUT)
        seed_everything(config.seed, workers=True, verbose=False)
        module = datamodule(config, data)
        table = module.index()
        if tell is not None and main_process():
            _tell_what_is_left_out(config, data, table, tell)
        check_thresholds(config, table)
        if resuming:
            held_out = run.held_out()
            # Other images may have been held out in place of bad ones.
            table = table if held_out is None else hold_out_as_before(table, held_out)
            check_same_data(run.manifest(), table)
        module.table = table
        # Built before the images are verified: missing weights are found in a second, bad images perhaps in an hour.
        model = model_plugin(config.model.name).build(_from_checkpoint(config) if resumes else config)
        if isinstance(model, DistillationRecipe):
            model.require_categories(trained_categories(table))
            if resumes:
                check_same_specialists(run.manifest(), _method(model))
        # What the first call has set is as explicit as what this one does.
        config = fit_trainer_arguments(config, model, {"trainer": config.trainer} if resuming else given or {})
        check_trainer_can_be_built(config.trainer)
        if resumes:
            check_epochs(run, epochs_of(run.last_checkpoint, model), config.trainer.get("max_epochs"))
        cache = pixel_cache(cache_path(run.folder), config, table)
        try:
            module.verify_images(verifying if main_process() else None, cache, keep_split=resuming)
            # Again: images have been left out.
            check_thresholds(config, module.table)
            # As a later station will find the data: with what is held out from now on, and the bad images still there.
            whole = table if resuming else hold_out_as_before(table, held_out_of(module.table))
            manifest = _manifest(config, module, model, data, whole.fingerprint())
            if main_process():
                if module.skipped and tell is not None:
                    tell(f"note: images left out that cannot be read: {len(module.skipped)}, see {run.skipped_file}")
                if tell is not None and isinstance(model, DistillationRecipe) and model.specialists is not None:
                    _tell_what_specialists_saw(model.specialists, module.table, tell)
                if resuming:
                    before = run.manifest()
                    manifest.weights = before.weights
                    manifest.earlier = [*before.earlier, before.model_dump(include={"versions", "command"})]
                write_start(run, config, manifest, module.table, module.skipped, fresh=not resuming)
            fitted = _fit(run, config, module, model, resumes=resumes, interactive=interactive)
            if not fitted["main"]:
                return None
            return _finish(run, config, module.table, manifest, fitted)
        finally:
            if cache is not None:
                cache.remove()


def _from_checkpoint(config: TrainConfig) -> TrainConfig:
    """Return the configuration of a model whose weights a checkpoint brings: where they once came from may be gone."""
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": CHECKPOINT})})


def check_thresholds(config: TrainConfig, table: SampleTable) -> None:
    """Find out before training whether the thresholds can be set after it.

    Raises:
        UadxError: No image of good parts is held out, or best F1 is wanted and there are no labelled validation images.
    """
    if len(table.where(split="train")) and not len(table.where(split="val", label=NORMAL)):
        raise UadxError(
            "no image of good parts is held out that can be read: the checkpoint and the thresholds come from these",
            "repair them or add others; see 'uadx data check'",
        )
    if config.thresholds.method == BEST_F1 and not len(table.where(split="val", label=ANOMALOUS)):
        raise UadxError(
            "thresholds.method best-f1 needs defective images in the validation split",
            "mark some 'val' in an index file, or use normal-fpr and set thresholds later with 'uadx thresholds'",
        )


def _tell_what_is_left_out(config: TrainConfig, data: str | Path, table: SampleTable, tell: Callable[[str], None]) -> None:
    """Say which folders of images are in no category, where the user has not chosen categories."""
    found = {} if config.data.categories else left_out(data, table, config.data.layout)
    if found:
        named = ", ".join(f"{folder} ({number})" for folder, number in found.items())
        tell(f"note: images that belong to no category are left out: {named}; docs/data.md shows the layouts")


def _tell_what_specialists_saw(specialists: Specialists, table: SampleTable, tell: Callable[[str], None]) -> None:
    seen = 0
    for category in trained_categories(table):
        of_product = {split: table.where(split=split, category=category, label=NORMAL) for split in ("train", "val")}
        training, held_out = (
            {from_category(table.relative(int(row)), category) for row in rows} for rows in of_product.values()
        )
        seen += len(specialists.have_seen(category, held_out, training))
    if seen:
        tell(
            f"note: specialists may have been trained on {seen} of the images held out here, which are to tell how well "
            "their student does on new ones; train all with the same data.split_seed and data.val_fraction"
        )


def pixel_cache(path: Path, config: TrainConfig, table: SampleTable) -> PixelCache | None:
    """Return the cache for decoded images; None when several processes train, or when it would be too large."""
    devices, accelerator = config.trainer.get("devices", "auto"), config.trainer.get("accelerator", "auto")
    one_by_itself = accelerator == "cpu" or torch.cuda.device_count() <= 1
    alone = devices in (1, "1", [0]) or (devices == "auto" and one_by_itself)
    if not config.data.cache or not alone or config.trainer.get("num_nodes", 1) != 1:
        return None
    cache = PixelCache(path, config.data.size)
    return cache if cache.fits(int((table.splits != SPLITS.index("test")).sum())) else None


def datamodule(config: TrainConfig, data: str | Path) -> UnifiedDataModule:
    """Return the datamodule that a configuration describes; nothing is read yet."""
    section = config.data
    return UnifiedDataModule(
        root=str(data),
        layout=section.layout,
        categories=section.categories,
        image_size=section.size,
        train_batch_size=section.train_batch_size,
        eval_batch_size=section.eval_batch_size,
        num_workers=section.num_workers,
        sampling=section.sampling,
        samples_per_epoch=section.samples_per_epoch,
        val_fraction=section.val_fraction,
        skip_bad=section.skip_bad,
        verify=False,
        seed=config.seed,
        split_seed=config.split_seed,
    )


def _manifest(
    config: TrainConfig, module: UnifiedDataModule, model: AnomalibModule, data: str | Path, fingerprint: str
) -> RunManifest:
    table = module.table
    counts = {
        category: {split: len(table.where(split=split, category=category)) for split in ("train", "val", "test")}
        for category in table.categories
    }
    trained = trained_categories(table)
    if not trained:
        raise UadxError(f"{data}: no normal training images", "a model learns from images of good parts")
    record = getattr(model, "weights_record", None)
    return RunManifest(
        model=config.model.name,
        categories=trained,
        image_size=config.data.size,
        data={
            "root": str(Path(data).expanduser().absolute()),
            "layout": config.data.layout,
            "counts": counts,
            "fingerprint": fingerprint,
            "skipped": len(module.skipped),
        },
        weights=asdict(record) if record else None,
        versions=versions() | ({"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {}),
        method=_method(model),
    )


def _method(model: AnomalibModule) -> dict[str, Any]:
    """Return what a model notes of its training in the run; those that note nothing have no ``run_record``."""
    record: dict[str, Any] = model.run_record() if hasattr(model, "run_record") else {}
    return record


def _fit(
    run: Run,
    config: TrainConfig,
    module: UnifiedDataModule,
    model: AnomalibModule,
    *,
    resumes: bool,
    interactive: bool | None,
) -> dict[str, Any]:
    held_out, seen = HeldOutLoss(module.categories), SampleCount()
    arguments: dict[str, Any] = {
        "deterministic": "warn",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 10,
        **config.trainer,
    }
    trainer = Trainer(
        **arguments,
        default_root_dir=run.folder,
        use_distributed_sampler=False,
        callbacks=[
            seen,
            held_out,
            *augmentation(config.augmentation),
            FiniteLoss("lower optimizer.lr" if isinstance(model, DistillationRecipe) else OWN_OPTIMIZER),
            TrainingProgress(interactive),
            BestCheckpoint(run.checkpoint),
            LastCheckpoint(run.last_checkpoint),
        ],
        plugins=[AtomicCheckpointIO(extra_safe_globals=list(model.checkpoint_safe_globals()))],
        logger=[CSVLogger(run.folder, name="logs/csv"), TensorBoardLogger(run.folder, name="logs/tensorboard")],
    )
    checkpoint = run.last_checkpoint if resumes else None
    try:
        trainer.fit(model, datamodule=module, ckpt_path=checkpoint)
    except SystemExit as stop:
        # Lightning leaves the process by itself on Ctrl-C, without a word.
        hint = f"continue it with --resume; the checkpoints in {run.folder} are whole"
        raise UadxError("training was interrupted", hint, exit_code=130) from stop
    if held_out.best["val_loss"] is None:
        # No epoch could be compared with another: what was learnt last is what there is. All processes take part.
        trainer.save_checkpoint(run.checkpoint)
    return {
        "main": trainer.is_global_zero,
        "best_epoch": held_out.best["epoch"] or trainer.current_epoch,
        "epochs": trainer.current_epoch,
        "best_val_loss": held_out.best["val_loss"],
        "val_loss_per_category": held_out.best["categories"],
        "seconds": seen.seconds,
        "samples_seen": seen.seen,
        "processes": trainer.world_size,
        "device": _name_of(trainer.strategy.root_device),
        "method": _method(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _name_of(device: torch.device) -> str:
    """Return what a device is: scores of a CPU and of a GPU are not the same to the bit."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _finish(
    run: Run, config: TrainConfig, table: SampleTable, manifest: RunManifest, fitted: dict[str, Any]
) -> dict[str, Any]:
    """Set the thresholds with the checkpoint kept, and write the figures."""
    with TorchDetector.load(run) as detector:
        thresholds = thresholds_from_samples(
            detector,
            table,
            table.where(split="val"),
            method=config.thresholds.method,
            target_fpr=config.thresholds.target_fpr,
            kind="held out from training",
            ratio_scale=ratio_scale(config.model.name),
        )
    write_json(run.thresholds_file, thresholds.as_dict())
    metrics = {
        **{key: value for key, value in fitted.items() if key not in {"main", "method"}},
        "thresholds": {name: threshold.value for name, threshold in thresholds.categories.items()},
    }
    write_json(run.metrics_file, metrics)
    # Last of all: from here on the run is finished.
    final = {"status": "finished", "checkpoint_sha256": sha256_of(run.checkpoint), "method": fitted["method"]}
    run.write_manifest(manifest.model_copy(update=final))
    return metrics
