"""AUROC of held-out good parts against the same parts with a defect drawn in: recipes are chosen by it, not by test images.

    python benchmarks/held_out_defects.py RUN [RUN …] --data DATA [--each 3]

Scratches, stains and blurs are drawn with the tools of the synthetic products, faint ones among them; the anomalies that
``model.options.synthetic_anomalies`` trains with are others. One JSON line a run.
"""

import argparse
import json
import sys
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchmetrics.functional.classification import binary_auroc

from uad_plugins.artifacts import Run
from uad_plugins.data.products.drawing import blend, blob, scratch
from uad_plugins.data.samples import NORMAL
from uad_plugins.detector import decode, open_detector
from uad_plugins.quantization.samples import samples_of


def spoil(rng, image, kind):
    """Draw a defect into a square or oblong part, uint8 ``(H, W, 3)``."""
    height, width = image.shape[:2]
    side = max(height, width)
    # In a square around the part that reaches from -1 to 1, as x and y.
    centre = (2 * rng.uniform(0.1, 0.9) * width / side - 1, 2 * rng.uniform(0.1, 0.9) * height / side - 1)
    pixels = image.astype(np.float32) / 255
    if kind == "scratch":
        weight, colour = scratch(rng, side, centre, rng.uniform(0.1, 0.3)), (float(rng.integers(2)),) * 3
        weight = weight * rng.uniform(0.1, 0.4)
    else:
        weight, colour = blob(rng, side, centre, rng.uniform(0.06, 0.2)), (float(rng.uniform()),) * 3
        weight = weight * (rng.uniform(0.12, 0.5) if kind == "stain" else 1.0)
    weight = weight[:height, :width]
    if kind == "blur":
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(side / 20))
        colour = np.asarray(blurred, dtype=np.float32) / 255
    return (np.clip(blend(pixels, colour, weight), 0, 1) * 255).astype(np.uint8)


def measure(folder, data, each):
    """Return AUROC by category, and the mean over them."""
    table, aurocs = samples_of(Run.open(folder), data, partial(print, file=sys.stderr)), {}
    with open_detector(folder) as detector:
        for category in detector.categories:
            rng = np.random.default_rng(0)
            scores, labels = [], []
            for index in table.where(split="val", category=category, label=NORMAL):
                good = decode(table.paths[int(index)], detector.image_size).pixels
                spoilt = [spoil(rng, good, kind) for kind in ("scratch", "stain", "blur") for _ in range(each)]
                scores += [found.score for found in detector.stream([good, *spoilt], categories=repeat(category))]
                labels += [0] + [1] * len(spoilt)
            aurocs[category] = binary_auroc(torch.tensor(scores), torch.tensor(labels)).item()
    return {"run": str(folder), "mean": float(np.mean(list(aurocs.values()))), **aurocs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--each", type=int, default=3, help="Defects of each kind in each part.")
    arguments = parser.parse_args()
    for folder in arguments.runs:
        print(json.dumps(measure(folder, arguments.data, arguments.each)), flush=True)


if __name__ == "__main__":
    main()
