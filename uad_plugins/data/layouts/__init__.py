"""Data layouts: how images lie in folders, and the scanner that finds which one it is."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from uad_plugins.data.layouts.walking import MASK_FOLDERS, walk
from uad_plugins.data.samples import SampleTable, relative_to
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.hookspecs import LayoutPlugin
from uad_plugins.registry import registry


def recognise(root: Path) -> LayoutPlugin:
    """Return the layout that a folder (or index file) has.

    Raises:
        UadxError: No registered layout recognises it.
    """
    layouts: list[LayoutPlugin] = registry().items("layout")
    confidence, _, best = max(
        ((_confidence(layout, root), layout.priority, layout) for layout in layouts), key=lambda entry: entry[:2]
    )
    if confidence <= 0:
        shapes = "; ".join(f"{layout.name}: {layout.summary}" for layout in layouts)
        raise UadxError(f"{root}: no known layout of images", f"known layouts: {shapes}")
    return best


def _confidence(layout: LayoutPlugin, root: Path) -> float:
    """Ask a layout; one that fails to answer does not recognise the folder."""
    try:
        return float(layout.recognise(root))
    except Exception as error:
        # A layout may be foreign code, and answer anything: the others must still be asked.
        sys.stderr.write(f"uadx: layout '{layout.name}' could not look at {root}: {type(error).__name__}: {error}\n")
        return 0.0


def scan(root: str | Path, layout: str | None = None, categories: Sequence[str] | None = None) -> SampleTable:
    """Index a data set without opening its images.

    Args:
        root: Folder or index file; may be relative, may begin with ``~``.
        layout: Name of a layout; None recognises it.
        categories: Restrict to these.

    Raises:
        UadxError: The root does not exist, has no known layout, or holds no image.
        UsageError: Unknown layout or category.
    """
    if not str(root).strip():
        raise UsageError("the path of the data is empty", "name a folder of images, or an index file; '.' for this folder")
    root = _absolute(root)
    if not root.exists():
        raise UadxError(f"{root}: no such file or folder", "check the path of the data")
    try:
        next(root.iterdir(), None)
    except NotADirectoryError:
        # An index file.
        pass
    except OSError as error:
        raise UadxError(f"{root}: cannot be read: {error.strerror}", "check its permissions") from error
    plugin = layout_of(root, layout)
    table = SampleTable(plugin.scan(root), root if root.is_dir() else root.parent)
    if len(table) == 0:
        raise UadxError(
            f"{root}: no image found for layout '{plugin.name}'",
            f"expected {plugin.summary}; name another with --layout",
        )
    return table.only(categories) if categories else table


def usual_layout(root: str | Path, origin: Mapping[str, Any]) -> str | None:
    """Return the layout that somebody named when a training began, where that is to be taken again.

    Args:
        root: Folder or index file.
        origin: What the training began with, as ``Run.source`` gives it.

    Returns:
        Its name, where the root is what was trained on, or has a product of the training in that layout; None where the
        layout is to be recognised.
    """
    name = origin.get("layout")
    if not name or not str(root).strip():
        return None
    if same_place(root, origin):
        return str(name)
    root = _absolute(root)
    plugin = next((plugin for plugin in registry().items("layout") if plugin.name == name), None)
    if plugin is None or not root.exists() or _confidence(plugin, root) <= 0:
        return None
    with suppress(UadxError, OSError):
        if not {sample.category for sample in plugin.scan(root)}.isdisjoint(origin.get("products") or ()):
            return str(name)
    return None


def same_place(root: str | Path, origin: Mapping[str, Any]) -> bool:
    """Tell whether a root is where the data lay that was trained on; see ``usual_layout``."""
    trained_in = origin.get("data")
    return bool(trained_in) and os.path.realpath(_absolute(root)) == os.path.realpath(str(trained_in))


def left_out(root: str | Path, table: SampleTable, layout: str | None = None) -> dict[str, int]:
    """Count the images below the root that belong to no category, as those of a product whose folder has another shape.

    Args:
        root: Folder or index file, as ``scan`` was given it.
        table: What ``scan`` found there, with all categories.
        layout: As ``scan`` was given it.

    Returns:
        Number of images by folder, relative to the root: the topmost one none of whose images is in the table. Empty where
        somebody chose the images (an index file). Mask folders are looked at by ``check_data``.
    """
    if not layout_of(root, layout).exhaustive:
        return {}
    known = {*table.paths, *table.masks}
    strays = [
        path
        for folder, found in walk(table.root, lambda _, error: None)
        if not MASK_FOLDERS.intersection(part.lower() for part in Path(relative_to(folder, table.root)).parts)
        for path in found
        if path not in known
    ]
    if strays:
        # Folders that links lead to have several names.
        real = {os.path.realpath(path) for path in known if path}
        strays = [path for path in strays if os.path.realpath(path) not in real]
    homes = {folder for path in table.paths for folder in Path(path).parents}
    counts: Counter[str] = Counter()
    for path in strays:
        above = list(Path(path).parents)
        top = next(
            (folder for folder in reversed(above) if folder.is_relative_to(table.root) and folder not in homes), above[0]
        )
        counts[top.relative_to(table.root).as_posix()] += 1
    return dict(sorted(counts.items()))


def _absolute(root: str | Path) -> Path:
    """Return the root without ``..``, which would be taken for the name of a category; links keep their names."""
    return Path(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100


def layout_of(root: str | Path, layout: str | None = None) -> LayoutPlugin:
    """Return the layout that somebody named, or that a folder or index file is recognised by.

    Raises:
        UadxError: No registered layout recognises it.
        UsageError: Unknown layout.
    """
    plugin: LayoutPlugin = registry().get("layout", layout) if layout else recognise(_absolute(root))
    return plugin
