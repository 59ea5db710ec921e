"""AUROC of held-out good parts against the same parts with a defect drawn in: recipes are chosen by it, not by test images.

    python benchmarks/held_out_defects.py RUN [RUN …] --data DATA [--each 2]

Scratches, stains, blurred places, holes, shades, misplaced pieces and pieces of other products, faint ones among them, in
shapes that ``model.options.synthetic_anomalies`` does not draw. One JSON line a run; its mean counts. Compare runs of the
same products: where there is but one, the foreign pieces are its own.
"""

import argparse
import json
import sys
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from uad_plugins.artifacts import Run
from uad_plugins.data.products.drawing import blend, blob, grid, scratch
from uad_plugins.data.samples import NORMAL
from uad_plugins.detector import decode, open_detector
from uad_plugins.evaluation.metrics import image_metrics
from uad_plugins.quantization.samples import samples_of

KINDS = ("scratch", "stain", "blur", "hole", "shade", "misplaced", "piece")


def spoil(rng, image, kind, other=None):
    """Draw a defect into a square or oblong part, uint8 ``(H, W, 3)``; ``other`` is one to take pieces from."""
    height, width = image.shape[:2]
    side = max(height, width)
    # In a square around the part that reaches from -1 to 1, as x and y.
    centre = (2 * rng.uniform(0.1, 0.9) * width / side - 1, 2 * rng.uniform(0.1, 0.9) * height / side - 1)
    pixels = image.astype(np.float32) / 255
    if kind == "scratch":
        weight, colour = scratch(rng, side, centre, rng.uniform(0.1, 0.3)), (float(rng.integers(2)),) * 3
        weight = weight * rng.uniform(0.1, 0.4)
    elif kind == "shade":
        y, x = grid(side)
        reach = rng.uniform(0.2, 0.6)
        weight = np.exp(-(((x - centre[0]) / reach) ** 2) - ((y - centre[1]) / (reach * rng.uniform(0.4, 1))) ** 2)
        colour = pixels * (rng.uniform(0.4, 0.8) if rng.integers(2) else rng.uniform(1.25, 1.6))
    else:
        weight, colour = blob(rng, side, centre, rng.uniform(0.06, 0.2)), (float(rng.uniform()),) * 3
        if kind == "stain":
            weight = weight * rng.uniform(0.12, 0.5)
        elif kind == "blur":
            colour = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(side / 20)), dtype=np.float32) / 255
        elif kind == "hole":
            weight, colour = blob(rng, side, centre, rng.uniform(0.03, 0.1)), (0.1 + 0.8 * float(rng.integers(2)),) * 3
        else:
            source = image if kind == "misplaced" else other
            shift = [int(rng.uniform(0.125, 0.875) * length) for length in (height, width)]
            colour = np.roll(source, shift, (0, 1)).astype(np.float32) / 255
            weight = weight * (rng.uniform(0.2, 1) if kind == "piece" else 1)
    return (np.clip(blend(pixels, colour, weight[:height, :width]), 0, 1) * 255).astype(np.uint8)


def measure(folder, data, each):
    """Return AUROC by category and by kind of defect, and the mean over them."""
    table, found = samples_of(Run.open(folder), data, partial(print, file=sys.stderr)), {}
    held_out = {name: table.where(split="val", category=name, label=NORMAL) for name in table.categories}
    with open_detector(folder) as detector:
        for category in detector.categories:
            rng = np.random.default_rng(0)
            foreign = np.concatenate([rows for name, rows in held_out.items() if name != category] or [held_out[category]])
            good_scores, bad_scores = [], {kind: [] for kind in KINDS}
            for index in held_out[category]:
                good = decode(table.paths[int(index)], detector.image_size).pixels
                other = decode(table.paths[int(rng.choice(foreign))], detector.image_size).pixels
                kinds = [kind for kind in KINDS for _ in range(each)]
                spoilt = [spoil(rng, good, kind, other) for kind in kinds]
                scores = [one.score for one in detector.stream([good, *spoilt], categories=repeat(category))]
                good_scores.append(scores[0])
                for kind, score in zip(kinds, scores[1:], strict=True):
                    bad_scores[kind].append(score)
            found[category] = [auroc(good_scores, bad_scores[kind]) for kind in KINDS]
    aurocs = np.array(list(found.values()))
    return {
        "run": str(folder),
        "mean": float(aurocs.mean()),
        "kinds": dict(zip(KINDS, aurocs.mean(axis=0).tolist(), strict=True)),
        "categories": dict(zip(found, aurocs.mean(axis=1).tolist(), strict=True)),
    }


def auroc(good, bad):
    """Return how well scores tell bad from good, 0..1."""
    return image_metrics(np.array(good + bad), np.array([0] * len(good) + [1] * len(bad)))["image_auroc"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--each", type=int, default=2, help="Defects of each kind in each part.")
    arguments = parser.parse_args()
    for folder in arguments.runs:
        print(json.dumps(measure(folder, arguments.data, arguments.each)), flush=True)


if __name__ == "__main__":
    main()
