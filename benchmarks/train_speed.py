"""Wall time of ``uadx train`` beside anomalib's own ``Engine.fit``, same images, model, size, batch and epochs, in one run.

    python benchmarks/train_speed.py [DATA] [--image-size 128] [--epochs 2] [--batch-size 16] [--repeats 2]

Both train STFPM with ResNet-18 on all training images of all categories, from the bundled weights. uadx holds 10 % of them
out; so that the work is the same, anomalib is given the same training images and validates on the same held-out ones. The
order alternates, and the ratio of the medians is what counts.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from anomalib.engine import Engine
from anomalib.models import Stfpm

from uad_plugins.config import resolve
from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.data.products.synthesis import synthesize
from uad_plugins.models.backbones import alias, backbone_weights
from uad_plugins.training.quiet import quiet_libraries
from uad_plugins.training.train import train


def with_uadx(arguments, data):
    flags = {
        "model": {"name": "stfpm", "weights": "bundled"},
        "data": {"image_size": arguments.image_size, "train_batch_size": arguments.batch_size, "num_workers": 0},
        "trainer": {"max_epochs": arguments.epochs},
    }
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        metrics = train(resolve(flags=flags, environment={}), data, Path(folder) / "run", interactive=False)
        return time.perf_counter() - started, metrics["samples_seen"]


def with_anomalib(arguments, data):
    size = (arguments.image_size, arguments.image_size)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        started = time.perf_counter()
        with backbone_weights("bundled"):
            model = Stfpm(backbone=alias("resnet18"), pre_processor=Stfpm.configure_pre_processor(size))
        # Its own reading and resizing: the images come at their full size, as from anomalib's datamodules.
        module = FullSize(str(data), train_batch_size=arguments.batch_size, eval_batch_size=32, num_workers=0, verify=False)
        engine = Engine(default_root_dir=folder, max_epochs=arguments.epochs, enable_progress_bar=False)
        engine.fit(model, datamodule=module)
        return time.perf_counter() - started, len(module.train_data) * arguments.epochs


class FullSize(UnifiedDataModule):
    """The unified split, read by anomalib's own dataset code."""

    def setup(self, stage=None):
        from anomalib.data.datasets.base.image import AnomalibDataset

        super().setup(stage)

        class Plain(AnomalibDataset):
            pass

        for name in ("train_data", "val_data", "test_data"):
            ours = getattr(self, name)
            if isinstance(ours, AnomalibDataset) and not hasattr(ours, "table"):
                continue
            plain = Plain()
            frame = ours.samples
            frame.attrs["task"] = "classification"
            plain.samples = frame
            plain.samples.attrs["task"] = "classification"
            setattr(self, name, plain)
        self._update_augmentations()

    def train_dataloader(self):
        from anomalib.data import AnomalibDataModule

        return AnomalibDataModule.train_dataloader(self)

    def val_dataloader(self):
        from anomalib.data import AnomalibDataModule

        return AnomalibDataModule.val_dataloader(self)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(arguments.data) if arguments.data else synthesize(Path(folder) / "products", side=256, train=80, test=2)
        times = {"uadx": [], "anomalib": []}
        for repeat in range(arguments.repeats):
            pair = [("uadx", with_uadx), ("anomalib", with_anomalib)]
            for name, run in pair if repeat % 2 == 0 else reversed(pair):
                seconds, images = run(arguments, data)
                times[name].append(seconds)
                print(f"{name}: {seconds:.1f} s for {images} images: {images / seconds:.1f} images/s", flush=True)
    ratio = statistics.median(times["uadx"]) / statistics.median(times["anomalib"])
    print(f"uadx / anomalib: {ratio:.2f} (below 1: uadx is faster)")


if __name__ == "__main__":
    main()
