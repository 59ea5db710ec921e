"""Indexing and reading very many images: seconds, bytes, and the growth of memory, for two sizes of a data set.

    python benchmarks/data_scale.py [--images 10000 100000] [--read 2000]

The images are hard links to one small file, so that the disk is not what is measured.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from uad_plugins.data.datamodule import UnifiedDataModule
from uad_plugins.data.layouts import scan


def resident():
    """Return the resident memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def build(root, images):
    for category in range(10):
        # One file a category: file systems limit the number of links to one.
        source = root / f"source_{category}.jpg"
        Image.fromarray(np.random.default_rng(category).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(source)
        folder = root / "data" / f"product_{category:02d}" / "train" / "good"
        folder.mkdir(parents=True)
        for number in range(images // 10):
            os.link(source, folder / f"{number:06d}.jpg")
    return root / "data"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--read", type=int, default=2000)
    arguments = parser.parse_args()
    for images in arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            data = build(Path(folder), images)
            before, started = resident(), time.perf_counter()
            table = scan(data)
            seconds, grown = time.perf_counter() - started, resident() - before
            print(f"{images} images indexed in {seconds:.2f} s, {grown:.0f} MB more resident")
            module = UnifiedDataModule(str(data), image_size=64, train_batch_size=50, num_workers=0, verify=False)
            started = time.perf_counter()
            module.setup("fit")
            print(f"  split and made ready in {time.perf_counter() - started:.2f} s ({len(table)} samples)")
            loader, seen, first = iter(module.train_dataloader()), 0, 0.0
            while seen < arguments.read:
                seen += len(next(loader).image)
                first = first or resident()
            print(f"  {seen} images read: {resident() - first:+.1f} MB after the first batch")


if __name__ == "__main__":
    main()
