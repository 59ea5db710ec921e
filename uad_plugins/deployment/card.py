"""The model card of a bundle: what it is, what it was measured at, how to run it, with pictures. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from uad_plugins.data.samples import ANOMALOUS, NORMAL, SampleTable
from uad_plugins.deployment.manifest import BundleManifest
from uad_plugins.detector import Detector
from uad_plugins.evaluation.overlays import label, outline, overlay, panel
from uad_plugins.evaluation.rows import describe, verdict
from uad_plugins.imaging import ImageError, read_mask, read_rgb, resize_mask

CARD = "README.md"
PICTURES = "pictures"
SIDE = 192
MOST = 12


def draw(detector: Detector, table: SampleTable, folder: Path) -> list[tuple[str, str]]:
    """Draw examples: of each product a good part and a defective one from the test split, else a held-out one.

    Args:
        detector: What finds the anomalies.
        table: The data.
        folder: The bundle; pictures go below ``pictures``.

    Returns:
        File name and caption of each.
    """
    chosen = _examples(table, detector.categories)
    found: list[tuple[str, str]] = []
    for index, prediction in zip(chosen, detector.stream(table.paths[index] for index in chosen), strict=True):
        if prediction.anomaly_map is None:
            continue
        sample = table[index]
        threshold = detector.thresholds.of(sample.category)
        judged = f"{describe(prediction.score, threshold)}: {verdict(prediction.score, threshold)}"
        try:
            image = read_rgb(sample.path)
            truth = _outlined(image, sample.mask, prediction.anomaly_map.shape)
        except ImageError:
            # Changed since it was scored.
            continue
        name = f"{PICTURES}/{len(found):02d}.jpg"
        (folder / PICTURES).mkdir(exist_ok=True)
        sheet = panel([label(truth, sample.defect), label(overlay(image, prediction.anomaly_map, threshold), judged)], SIDE)
        sheet.save(folder / name, format="JPEG", quality=85)
        found.append((name, f"{sample.category}, {sample.defect}: {judged}"))
    return found


def _examples(table: SampleTable, categories: list[str]) -> list[int]:
    chosen: list[int] = []
    for category in [name for name in categories if name in table.categories]:
        good = table.where(split="test", category=category, label=NORMAL)
        held = table.where(split="val", category=category, label=NORMAL)
        bad = table.where(split="test", category=category, label=ANOMALOUS)
        chosen += [*(good if len(good) else held)[:1].tolist(), *bad[:1].tolist()]
    return chosen[:MOST]


def _outlined(image: Image.Image, mask: str, shape: tuple[int, ...]) -> Image.Image:
    if not mask:
        return image
    return outline(image, resize_mask(read_mask(mask), (shape[0], shape[1])))


def card(manifest: BundleManifest, usage: str, pictures: list[tuple[str, str]], name: str) -> str:
    """Return the model card as Markdown.

    Args:
        manifest: Of the bundle; its files need not be listed yet.
        usage: How it is run (``PackagingResult.usage``).
        pictures: File name and caption of each example.
        name: What the bundle is called.
    """
    height, width = manifest.image_size
    facts = {
        "method": manifest.model,
        "target": manifest.target,
        "precision": manifest.precision,
        "input": f"{width} x {height} pixels, RGB, resized bilinearly with antialiasing",
        "calibrated on": _calibration(manifest.calibration),
        "made from": f"{manifest.source.get('kind')} `{manifest.source.get('name')}`",
        "checkpoint": f"SHA-256 `{manifest.source.get('checkpoint_sha256')}`",
        "backbone weights": _weights(manifest.weights),
        "uadx": manifest.versions.get("uadx", ""),
    }
    sections = [
        f"# {name}",
        f"Finds anomalies in images of {', '.join(manifest.categories)}. Learnt from images of good parts alone.",
        _table(("", ""), [(key, value) for key, value in facts.items() if value]),
        "## Thresholds",
        f"Scores above the threshold are anomalous. Set from {manifest.thresholds.source or 'nothing yet'}.",
        _table(("category", "threshold", "how", "normal images", "anomalous images"), _thresholds(manifest)),
    ]
    measured = _measured(manifest)
    if measured:
        sections += ["## Measured", _table(("what", "value"), measured)]
    sections += ["## Use", usage.replace("{bundle}", name)]
    if pictures:
        sections += ["## Examples", "Left the image with its ground truth, right the anomaly map."]
        sections += [f"![{caption}]({file})  \n{caption}" for file, caption in pictures]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _thresholds(manifest: BundleManifest) -> list[tuple[str, ...]]:
    entries = [*manifest.thresholds.categories.items(), ("(unknown)", manifest.thresholds.pooled)]
    return [
        (name, "none" if item.value is None else f"{item.value:.4g}", item.how, str(item.normal), str(item.anomalous))
        for name, item in entries
    ]


def _calibration(calibration: Mapping[str, Any]) -> str:
    return f"{calibration.get('samples')} samples ({calibration.get('source')})" if calibration else ""


def _weights(weights: Mapping[str, Any]) -> str:
    if not weights:
        return ""
    if "architecture" not in weights:
        return f"licence {weights.get('licence')}"
    return (
        f"{weights.get('architecture')} from {weights.get('source')} (`{weights.get('origin')}`); {weights.get('licence')}"
    )


def _measured(manifest: BundleManifest) -> list[tuple[str, ...]]:
    rows = _trained(manifest.metrics.get("training", {}))
    quantization = manifest.metrics.get("quantization", {})
    for category, metrics in (quantization.get("auroc") or {}).items():
        for metric, values in metrics.items():
            rows.append(
                (f"{category}: {metric.replace('_', ' ')}", f"{values['quantized']:.4f} (FP32 {values['fp32']:.4f})")
            )
    rows += _evaluated(manifest.metrics.get("evaluation", {}))
    for engine, agreement in (quantization.get("agreement_with_fp32") or {}).items():
        # Between two engines of the same file it is no matter of FP32.
        what = engine if " and " in engine else f"{engine} against FP32"
        rows.append((what, _agreement(agreement, "held-out images")))
    for engine, agreement in manifest.metrics.get("verified", {}).items():
        rows.append((f"{engine} against the source", _agreement(agreement, manifest.metrics.get("verified_on", "images"))))
    return rows


def _evaluated(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the AUROC that the source was last measured at."""
    named = {**evaluation.get("categories", {}), "mean": evaluation.get("mean", {})}
    return [
        (f"{name}: {metric.replace('_', ' ')}, evaluated", f"{values[metric]:.4f}")
        for name, values in named.items()
        for metric in ("image_auroc", "pixel_auroc")
        if values.get(metric) is not None
    ]


def _trained(training: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return what the training has noted of itself, as far as it is a figure of the model."""
    rows: list[tuple[str, ...]] = []
    if training.get("best_epoch") is not None:
        rows.append(("training: best epoch", f"{training['best_epoch']} of {training.get('epochs')}"))
    if training.get("best_val_loss") is not None:
        rows.append(("training: loss on held-out images", f"{training['best_val_loss']:.4g}"))
    for category, loss in (training.get("val_loss_per_category") or {}).items():
        rows.append((f"{category}: loss on held-out images", f"{loss:.4g}"))
    return rows


def _agreement(agreement: Mapping[str, Any], images: str) -> str:
    differences = [
        f"{name} differ by {100 * agreement[key]:.2g} %"
        for name, key in (("maps", "map_l2"), ("scores", "score_l2"))
        if agreement.get(key) is not None
    ]
    return f"{', '.join(differences)} ({agreement.get('images')} {images})"
