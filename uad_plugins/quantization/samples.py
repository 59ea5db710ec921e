"""The samples that a run is quantized and judged with: its own products, split as they were for its training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from uad_plugins.artifacts import Run, read_json
from uad_plugins.data.layouts import scan, usual_layout
from uad_plugins.data.samples import NORMAL, SampleTable, split_again
from uad_plugins.errors import UadxError


def samples_of(run: Run, data: str | None, tell: Callable[[str], None]) -> SampleTable:
    """Return the samples of a run's products, with the splits of its training, wherever the data lies now.

    Args:
        run: The trained run.
        data: Where its data is now; None: where it was.
        tell: Called with a line about what has changed since.

    Raises:
        UadxError: The data is not there, or it can no longer be told which images were held out.
    """
    origin, manifest = run.source(), run.manifest()
    root = data or str(manifest.data.get("root"))
    if not Path(root).expanduser().exists():
        raise UadxError(f"{root}: the run's data is not there", "say where it is now: --data DATA")
    found = scan(root, usual_layout(root, origin), origin["categories"])
    foreign = [name for name in found.categories if name not in manifest.categories]
    if foreign:
        tell(f"note: the run was not trained on {', '.join(foreign)}: left out")
    table = found.only([name for name in found.categories if name in manifest.categories])
    table = split_again(table, origin)
    lost = [
        name
        for name in table.categories
        if len(table.where(split="train", category=name)) and not len(table.where(split="val", category=name, label=NORMAL))
    ]
    if lost:
        raise UadxError(
            f"{root}: none of the images of {', '.join(lost)} is there that were held out from training",
            "give the data that the run was trained on, wherever it lies now (--data), or train anew",
        )
    changed = _changes(run, table)
    if changed and origin["held_out"] is None:
        raise UadxError(
            f"{root}: the training images have changed since the run was trained ({', '.join(changed)})",
            "what was held out from its training cannot be told any more: put them back as they were, or train anew",
        )
    if changed:
        tell(f"note: the training images have changed ({', '.join(changed)}); held out is what was held out from training")
    return table


def _changes(run: Run, table: SampleTable) -> list[str]:
    """Return in words how many training images there were and are, of products where it is another number."""
    counts = run.manifest().data.get("counts", {})
    skipped = run.folder / "skipped.json"
    readable = table.without(set(read_json(skipped))) if skipped.is_file() else table
    found = []
    for name in readable.categories:
        then = sum(counts.get(name, {}).get(split, 0) for split in ("train", "val"))
        now = sum(len(readable.where(split=split, category=name)) for split in ("train", "val"))
        if then != now:
            found.append(f"{name}: {then} then, {now} now")
    return found
