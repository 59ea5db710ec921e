"""Walking folders for the layouts: entries are listed, nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from uad_plugins.imaging import is_image

NORMAL_NAMES = frozenset({"good", "ok", "normal", "pass", "passed", "nominal", "defect_free", "defect-free", "ok_parts"})
"""Folder names, in lower case, that hold images of good parts."""

MASK_FOLDERS = frozenset({"ground_truth", "groundtruth", "gt", "mask", "masks"})
"""Folder names, in lower case, that hold masks."""


def folders(root: Path) -> list[Path]:
    """Return the sub-folders, sorted, hidden ones left out; none of what may not be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(Path(e.path) for e in entries if is_folder(e) and not e.name.startswith("."))
    except (NotADirectoryError, FileNotFoundError, PermissionError):
        return []


def images(root: Path) -> Iterator[str]:
    """Yield the image files below a folder, at any depth, hidden files and folders left out.

    Every folder is visited once, however many links lead to it, by its own name where it has one. A folder below that may
    not be read (``lost+found``) is left out; ``uadx data check`` names it.

    Raises:
        OSError: The folder itself cannot be read.
    """

    def unreadable(_: str, error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error

    for _, found in walk(root, unreadable):
        yield from found


def walk(
    root: Path, unreadable: Callable[[str, OSError], None], enter: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder from a root on with the image files that lie in it; hidden files and folders are left out.

    Every folder is visited once, however many links lead to it, by its own name where it has one.

    Args:
        root: Where to begin.
        unreadable: Called with a folder below that cannot be listed, which is left out, and why.
        enter: Real path of a folder -> whether it is visited.

    Raises:
        OSError: The root itself cannot be listed.
    """
    own = [(str(root), os.path.realpath(root))]
    linked: list[tuple[str, str]] = []
    visited: set[str] = set()
    while own or linked:
        place, real = own.pop() if own else linked.pop()
        if real in visited or not enter(real):
            continue
        visited.add(real)
        try:
            with os.scandir(place) as listed:
                entries = [(e.name, e.path, is_folder(e), e.is_symlink()) for e in listed if not e.name.startswith(".")]
        except OSError as error:
            if place == str(root):
                raise
            unreadable(place, error)
            continue
        yield place, [path for name, path, leads_on, _ in entries if not leads_on and is_image(name)]
        for name, path, leads_on, is_link in entries:
            if leads_on and is_link:
                linked.append((path, os.path.realpath(path)))
            elif leads_on:
                own.append((path, os.path.join(real, name)))  # noqa: PTH118


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or leads to one; a link that leads to itself does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def images_if_readable(root: Path) -> Iterator[str]:
    """Yield what ``images`` does; nothing where the folder itself may not be read, as one below a data set's root."""
    with suppress(PermissionError):
        yield from images(root)


def is_normal(name: str) -> bool:
    """Tell whether a folder name stands for good parts."""
    return name.lower() in NORMAL_NAMES


def child(root: Path, *names: str) -> Path | None:
    """Return the sub-folder with one of the given lower-case names, in any letter case."""
    return next((folder for folder in folders(root) if folder.name.lower() in names), None)


def mask_index(root: Path) -> dict[str, str]:
    """Index the masks of one folder by the stem of the image they belong to (``000_mask.png`` belongs to ``000``)."""
    index: dict[str, str] = {}
    for path in images_if_readable(root):
        stem = os.path.splitext(os.path.relpath(path, root))[0].replace("\\", "/")  # noqa: PTH122
        for ending in ("_mask", "_gt", "-mask", ""):
            if stem.lower().endswith(ending):
                index.setdefault(stem[: len(stem) - len(ending)] if ending else stem, path)
                break
    return index


def stem_below(path: str, root: Path) -> str:
    """Return the path of an image below a folder, without its ending: the key under which its mask is looked up."""
    return os.path.splitext(os.path.relpath(path, root))[0].replace("\\", "/")  # noqa: PTH122
