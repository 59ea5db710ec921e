"""The one-page HTML report of an evaluation: one file, pictures inside, nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uad_plugins.artifacts import write_text
from uad_plugins.evaluation.evaluate import Evaluation
from uad_plugins.evaluation.rows import describe, worst_first

HEADINGS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO (FPR ≤ 0.3)",
}

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.note { color: #5b6875; margin-top: .2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e3e8ee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: #5b6875; font-size: .85rem; }
tr.mean td { font-weight: 600; border-top: 2px solid #1d2733; } tr.pooled td { color: #5b6875; }
.bar { display: inline-block; height: .55rem; background: #2f6fdd; border-radius: 2px;
  margin-left: .5rem; vertical-align: middle; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; border-radius: 4px; display: block; }
figcaption { color: #5b6875; font-size: .8rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
"""


def write_report(
    evaluation: Evaluation,
    path: Path,
    *,
    title: str,
    facts: dict[str, str],
    beside: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page.

    Args:
        evaluation: What was measured; its pictures are embedded.
        path: HTML file.
        title: Heading.
        facts: What was trained on what, shown under the heading.
        beside: AUROC of FP32 and a quantized model by category, as ``QuantizedManifest.auroc`` has it.
    """
    write_text(path, _page(evaluation, title, facts, beside))
    return path


def figure(value: float | None) -> str:
    """Write a metric for people: three digits, or a dash where it is undefined."""
    return "–" if value is None else f"{value:.3f}"


def _page(evaluation: Evaluation, title: str, facts: dict[str, str], beside: Mapping[str, Any] | None) -> str:
    note = " · ".join(f"{html.escape(key)}: {html.escape(value)}" for key, value in facts.items())
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p class='note'>{note}</p>",
        "<h2>Detection by category</h2><div class='scroll'>",
        _metrics_table(evaluation.report),
        "</div><h2>Decisions with the stored thresholds</h2><div class='scroll'>",
        _decisions_table(evaluation.report),
        "</div>",
        _beside_table(beside or {}),
        _mistakes(evaluation),
        _pictures(evaluation),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _metrics_table(report: dict[str, Any]) -> str:
    heading = "".join(f"<th>{name}</th>" for name in HEADINGS.values())
    rows = [f"<table><tr><th>category</th>{heading}<th>good / defective</th></tr>"]
    for name, values in report["categories"].items():
        rows.append(_metrics_row(name, values, ""))
    rows.append(_metrics_row("mean over categories", report["mean"], "mean"))
    rows.append(_metrics_row("all images pooled", report["pooled"], "pooled"))
    return "\n".join([*rows, "</table>"])


def _metrics_row(name: str, values: dict[str, Any], kind: str) -> str:
    cells = []
    for metric in HEADINGS:
        value = values.get(metric)
        bar = f"<span class='bar' style='width:{max(0.0, value - 0.5) * 4:.2f}rem'></span>" if value is not None else ""
        cells.append(f"<td>{figure(value)}{bar if metric == 'image_auroc' else ''}</td>")
    counts = f"{values['normal']} / {values['anomalous']}" if "normal" in values else ""
    return f"<tr class='{kind}'><td>{html.escape(name)}</td>{''.join(cells)}<td>{counts}</td></tr>"


def _beside_table(beside: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{HEADINGS[metric]}</td><td>{figure(values['fp32'])}</td>"
        f"<td>{figure(values['quantized'])}</td><td>{values['drop']:+.4f}</td></tr>"
        for name, metrics in beside.items()
        for metric, values in metrics.items()
    ]
    if not rows:
        return ""
    heading = "<tr><th>category</th><th></th><th>FP32</th><th>INT8</th><th>drop</th></tr>"
    return f"<h2>FP32 beside INT8</h2><div class='scroll'><table>{heading}{''.join(rows)}</table></div>"


def _decisions_table(report: dict[str, Any]) -> str:
    rows = ["<table><tr><th>category</th><th>threshold</th><th>good parts rejected</th><th>defective parts found</th></tr>"]
    for name, values in report["decisions"].items():
        rejected, found = (
            "–" if values[key] is None else f"{100 * values[key]:.1f} %"
            for key in ("false_positive_rate", "true_positive_rate")
        )
        threshold = "none" if values["threshold"] is None else f"{values['threshold']:.4g}"
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{threshold}</td><td>{rejected}</td><td>{found}</td></tr>")
    return "\n".join([*rows, "</table>"])


def _mistakes(evaluation: Evaluation) -> str:
    rows = list(worst_first(evaluation.rows))[:8]
    if not rows:
        return ""
    body = "".join(
        f"<tr><td>{html.escape(row['path'])}</td><td>{row['label']}</td><td>{row['verdict']}</td>"
        f"<td>{describe(row['score'], row['threshold'])}</td></tr>"
        for row in rows
    )
    return (
        "<h2>Most wrong</h2><div class='scroll'><table><tr><th>image</th><th>is</th><th>judged</th><th>score</th></tr>"
        f"{body}</table></div>"
    )


def _pictures(evaluation: Evaluation) -> str:
    sections = []
    for category in sorted({picture.category for picture in evaluation.pictures}):
        mine = [picture for picture in evaluation.pictures if picture.category == category and picture.example]
        figures = "".join(
            f"<figure><img alt='{html.escape(picture.caption)}' "
            f"src='data:image/jpeg;base64,{base64.b64encode(picture.path.read_bytes()).decode()}'>"
            f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
            for picture in mine
        )
        sections.append(f"<h2>{html.escape(category)}</h2><div class='pictures'>{figures}</div>")
    return "\n".join(sections)
