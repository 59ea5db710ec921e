"""anomalib's own engine and command line take our models, datamodule and runs as they are."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from anomalib.engine import Engine
from anomalib.models import Stfpm as AnomalibStfpm

from uad_plugins.data.batches import UnifiedBatch
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.data.layouts import scan
from uad_plugins.detector import open_detector
from uad_plugins.evaluation.evaluate import evaluate
from uad_plugins.models import ReverseDistillation, Stfpm
from uad_plugins.models.backbones import CHECKPOINT, alias, backbone_weights
from uad_plugins.training.quiet import quiet_libraries

# Lightning's advice about loggers and callbacks of a bare engine.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet_libraries():
        yield


def engine(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return Engine(default_root_dir=tmp_path, **quiet, **options)


def module(products, **options):
    return UnifiedDataModule(str(products), train_batch_size=8, num_workers=0, **options)


@pytest.mark.parametrize("cls", [Stfpm, pytest.param(ReverseDistillation, marks=pytest.mark.slow)])
def test_the_engine_fits_and_tests_our_model_on_our_data(products, tmp_path, cls):
    model = cls(
        backbone="resnet18", weights="bundled", pre_processor=cls.configure_pre_processor((64, 64)), visualizer=False
    )
    data = module(products)
    runner = engine(tmp_path, max_epochs=1)
    runner.fit(model=model, datamodule=data)
    assert data.train_data.image_size == (64, 64)
    (results,) = runner.test(model=model, datamodule=data)
    assert set(results) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
    assert 0 < results["pixel_AUROC"] <= 1


def test_the_engine_tests_a_run(products, trained, tmp_path):
    (results,) = engine(tmp_path).test(
        model=Stfpm(weights="checkpoint", visualizer=False),
        datamodule=module(products, image_size=64),
        ckpt_path=trained / "model.ckpt",
    )
    with open_detector(trained) as detector:
        report = evaluate(detector, scan(products)).report
    assert results["image_AUROC"] == pytest.approx(report["pooled"]["image_auroc"], abs=0.005)
    assert results["pixel_AUROC"] == pytest.approx(report["pooled"]["pixel_auroc"], abs=0.005)


def test_anomalibs_own_model_tests_a_run(products, trained, tmp_path):
    with backbone_weights(CHECKPOINT):
        theirs = AnomalibStfpm(
            backbone=alias("resnet18"), pre_processor=AnomalibStfpm.configure_pre_processor((64, 64)), visualizer=False
        )
    (results,) = engine(tmp_path).test(model=theirs, datamodule=module(products), ckpt_path=trained / "model.ckpt")
    with open_detector(trained) as detector:
        pooled = evaluate(detector, scan(products)).report["pooled"]
    # Theirs clips scores to a range; ours are ranked as they are.
    assert results["image_AUROC"] == pytest.approx(pooled["image_auroc"], abs=0.05)
    assert results["pixel_AUROC"] == pytest.approx(pooled["pixel_auroc"], abs=0.05)


def test_predictions_carry_the_category(products, trained, tmp_path):
    batches = engine(tmp_path).predict(
        model=Stfpm(weights="checkpoint", visualizer=False),
        datamodule=module(products, image_size=64),
        ckpt_path=trained / "model.ckpt",
    )
    assert all(isinstance(batch, UnifiedBatch) for batch in batches)
    categories = [category for batch in batches for category in batch.category]
    assert [categories.count(name) for name in ("connector", "fabric", "washer")] == [8, 8, 8]
    assert all(batch.pred_score.numel() == len(batch.category) for batch in batches)
    assert torch.cat([batch.category_index for batch in batches]).bincount().tolist() == [8, 8, 8]


@pytest.mark.slow
def test_anomalibs_command_line_takes_our_classes_by_path(products, tmp_path):
    config = {
        "model": {"class_path": "uad_plugins.models.stfpm.Stfpm", "init_args": {"weights": "bundled", "visualizer": False}},
        "data": {
            "class_path": "uad_plugins.data.datamodule.UnifiedDataModule",
            "init_args": {"root": str(products), "image_size": 64, "train_batch_size": 8, "num_workers": 0},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        "default_root_dir": str(tmp_path / "results"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from anomalib.cli.cli import main; main()",
            "fit",
            "--config",
            "config.yaml",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "results").rglob("*.ckpt"))
