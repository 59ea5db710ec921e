"""One sheet of the anomaly maps that several runs give for the same test images.

    python benchmarks/compare_maps.py DATA RUN RUN RUN --each 2 --out maps.jpg

A row is an image with its ground truth, then one heat map a run, each relative to the run's own threshold. With
``--own-range`` a heat map goes from the lowest to the highest value of its image: where a method looks, not what it decides.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from uad_plugins.data.layouts import scan
from uad_plugins.detector import open_detector
from uad_plugins.evaluation.overlays import label, outline, overlay, panel
from uad_plugins.evaluation.rows import describe
from uad_plugins.imaging import read_mask, read_rgb


def chosen(table, each):
    """Defective test images spread over the defect types of every category."""
    for category in table.categories:
        indices = table.where(split="test", category=category, label=1)
        yield from indices[np.linspace(0, len(indices) - 1, num=min(each, len(indices))).round().astype(int)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--categories", nargs="+")
    parser.add_argument("--each", type=int, default=2, help="Images of each category.")
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--own-range", action="store_true", help="Heat maps relative to their own values.")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    table = scan(arguments.data, categories=arguments.categories)
    samples = [table[int(index)] for index in chosen(table, arguments.each)]
    columns = []
    for sample in samples:
        image = read_rgb(sample.path)
        truth = outline(image, read_mask(sample.mask)) if sample.mask else image
        columns.append([label(truth.resize((arguments.side,) * 2), f"{sample.category}: {sample.defect}")])
    for run in arguments.runs:
        with open_detector(run) as detector:
            predictions = detector.stream([s.path for s in samples], categories=[s.category for s in samples])
            for row, sample, prediction in zip(columns, samples, predictions, strict=True):
                threshold = detector.thresholds.of(sample.category)
                given, top = prediction.anomaly_map, threshold
                if arguments.own_range:
                    # The hottest colour is that of twice the threshold.
                    given, top = given - given.min(), float(np.ptp(given)) / 2
                heat = overlay(read_rgb(sample.path), given, top).resize((arguments.side,) * 2)
                row.append(label(heat, f"{run.name} {describe(prediction.score, threshold)}"))
    rows = [panel(row, arguments.side) for row in columns]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height + 4 for row in rows) - 4), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 4
    sheet.save(arguments.out, quality=88)
    print(f"{arguments.out}: {len(samples)} images, {len(arguments.runs)} runs")


if __name__ == "__main__":
    main()
