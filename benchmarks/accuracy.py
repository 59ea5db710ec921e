"""AUROC of one unified model, of one model a category, and of plain anomalib, on the same images with the same weights.

    python benchmarks/accuracy.py DATA --weights FILE --image-size 128 --epochs 5 --seeds 0 1 2 --out RESULTS

Every training appends one line to RESULTS/accuracy.jsonl; what is there already is not trained again.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import ReverseDistillation, Stfpm

from uad_plugins.artifacts import sha256_of
from uad_plugins.config import from_assignments, merge, recipe_path, resolve, to_yaml
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.data.layouts import scan
from uad_plugins.detector import open_detector
from uad_plugins.evaluation.evaluate import evaluate
from uad_plugins.evaluation.metrics import mean_over
from uad_plugins.evaluation.thresholds import set_thresholds
from uad_plugins.models.backbones import backbone_weights, load_backbone
from uad_plugins.models.torch_detector import TorchDetector
from uad_plugins.training.quiet import quiet_libraries
from uad_plugins.training.train import train


def configured(arguments, recipe, categories, seed):
    """Return the configuration of a training with uadx."""
    flags = {
        "model": {"weights": arguments.weights, "backbone": "resnet18"},
        "data": {"image_size": arguments.image_size, "categories": categories},
        "trainer": {"max_epochs": arguments.epochs, "precision": arguments.precision},
        "seed": seed,
    }
    flags = merge(flags, from_assignments(arguments.set))
    return resolve(file=recipe_path(recipe), flags=flags, environment={})


def uadx_run(arguments, recipe, categories, seed):
    """Train and evaluate with uadx; return metrics by category and seconds."""
    config = configured(arguments, recipe, categories, seed)
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(config, arguments.data, Path(folder) / "run", interactive=False)
        with open_detector(Path(folder) / "run") as detector:
            result = evaluate(detector, scan(arguments.data, categories=categories))
    return result.report["categories"], metrics["seconds"], metrics["best_val_loss"]


def anomalib_run(arguments, recipe, categories, seed):
    """Train with anomalib's own model, recipe and engine; evaluate as above."""
    from lightning.pytorch import seed_everything

    seed_everything(seed, verbose=False)
    size = (arguments.image_size, arguments.image_size)
    if recipe.startswith("stfpm"):
        from uad_plugins.models.backbones import alias

        with backbone_weights(arguments.weights):
            model = Stfpm(backbone=alias("resnet18"), pre_processor=Stfpm.configure_pre_processor(size), visualizer=False)
    else:
        processor = ReverseDistillation.configure_pre_processor(size)
        model = ReverseDistillation(backbone="resnet18", pre_trained=False, pre_processor=processor, visualizer=False)
        load_backbone(model.model.encoder.feature_extractor, "resnet18", arguments.weights)
    if len(categories) == 1:
        root = Path(arguments.data) / categories[0]
        defects = sorted(folder.name for folder in (root / "test").iterdir() if folder.name != "good")
        data = Folder(
            name=categories[0],
            root=root,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{name}" for name in defects],
            train_batch_size=16,
            num_workers=0,
        )
    else:
        # anomalib has no unified datamodule of its own.
        data = UnifiedDataModule(
            str(arguments.data), categories=categories, image_size=arguments.image_size, train_batch_size=16, seed=seed
        )
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        engine = Engine(
            default_root_dir=folder, max_epochs=arguments.epochs, precision=arguments.precision, enable_progress_bar=False
        )
        started = time.monotonic()
        engine.fit(model, datamodule=data)
        seconds = time.monotonic() - started
        thresholds = set_thresholds(*_one_score(categories), source="none")
        detector = TorchDetector(model, "anomalib", categories, size, thresholds)
        result = evaluate(detector, scan(arguments.data, categories=categories))
    return result.report["categories"], seconds, None


def _one_score(categories):
    import numpy as np

    return np.ones(1), np.zeros(1, dtype=int), categories[:1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["stfpm_short"])
    parser.add_argument("--by", nargs="+", default=["uadx", "anomalib"], choices=["uadx", "anomalib"])
    parser.add_argument("--settings", nargs="+", default=["unified", "one-class"])
    parser.add_argument("--precision", default="32-true", help="Of Lightning's Trainer, for both.")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="More settings, of uadx's trainings.")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "accuracy.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {row["key"] for row in rows}
    samples = scan(arguments.data)
    categories = samples.categories
    weights = Path(arguments.weights)
    origin = samples.fingerprint() + (sha256_of(weights) if weights.is_file() else arguments.weights)
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            for by in arguments.by:
                for setting in arguments.settings:
                    budget = f"{arguments.image_size}px {arguments.epochs}ep {arguments.precision}"
                    key = f"{by} {recipe} {setting} {budget} seed{seed} {hashlib.sha256(origin.encode()).hexdigest()[:8]}"
                    if by == "uadx":
                        # A recipe may change, and keep its name.
                        whole = to_yaml(configured(arguments, recipe, categories, seed))
                        key += f" {hashlib.sha256(whole.encode()).hexdigest()[:8]}"
                    if key in done:
                        continue
                    run = uadx_run if by == "uadx" else anomalib_run
                    groups = [categories] if setting == "unified" else [[name] for name in categories]
                    results, seconds, losses = {}, 0.0, []
                    for group in groups:
                        found, took, loss = run(arguments, recipe, group, seed)
                        results |= found
                        seconds += took
                        losses.append(loss)
                    row = {
                        "key": key,
                        "seconds": seconds,
                        "val_loss": losses,
                        "mean": mean_over(results),
                        "categories": results,
                    }
                    with log.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    auroc = {name: round(values["image_auroc"], 3) for name, values in results.items()}
                    print(f"{key}: mean image AUROC {row['mean']['image_auroc']:.4f} {auroc} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
