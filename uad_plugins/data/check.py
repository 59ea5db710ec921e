"""Checking a data set: is every image readable, and what else would spoil training or its measurement."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from uad_plugins.cpu import cores
from uad_plugins.data.layouts.walking import MASK_FOLDERS, is_normal, walk
from uad_plugins.data.samples import ANOMALOUS, NORMAL, Sample, SampleTable, relative_to
from uad_plugins.errors import UadxError
from uad_plugins.imaging import ImageError, misfit, open_image, read_mask, read_rgb
from uad_plugins.progress import Progress

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Problem:
    """Something found.

    Attributes:
        severity: ``error`` when it breaks training, else ``warning``.
        kind: Machine-readable name of the kind of problem.
        path: File concerned, relative to the root; empty when it concerns a category.
        message: What is wrong, in one line.
    """

    severity: str
    kind: str
    path: str
    message: str


@dataclass
class CategoryReport:
    """Counts of one category; sizes are ``WIDTHxHEIGHT`` -> number of images, formats likewise."""

    train: int = 0
    val: int = 0
    test_normal: int = 0
    test_anomalous: int = 0
    masks: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)


@dataclass
class DataReport:
    """The outcome of ``check_data``."""

    categories: dict[str, CategoryReport]
    problems: list[Problem]

    @property
    def trainable(self) -> bool:
        """Whether nothing found would break training."""
        return not any(problem.severity == ERROR for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"trainable": self.trainable, **asdict(self)}


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(16, cores()))


def unreadable(
    paths: Sequence[str], progress: Progress | None = None, keep: Callable[[int, Image.Image], None] | None = None
) -> dict[str, str]:
    """Decode images in parallel and return the reason for each that cannot be decoded, by path.

    Args:
        paths: Image files.
        progress: Called as images are done.
        keep: Called, from several threads, with the position of each good image and the image.
    """

    def examine(entry: tuple[int, str]) -> str | None:
        position, path = entry
        try:
            image = read_rgb(path)
        except ImageError as error:
            return error.message.removeprefix(f"{path}: ")
        if keep is not None:
            keep(position, image)
        return None

    reasons: dict[str, str] = {}
    with _pool() as pool:
        for done, reason in enumerate(_in_order(pool, examine, enumerate(paths))):
            if reason is not None:
                reasons[paths[done]] = reason
            if progress is not None:
                progress(done + 1, len(paths))
    return reasons


def _in_order(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Map over a pool with a bounded number of items under way: memory does not grow with the number of items."""
    pending: list[Any] = []
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= 64:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def require_readable(
    table: SampleTable,
    splits: tuple[str, ...],
    *,
    skip_bad: bool,
    progress: Progress | None = None,
    keep: Callable[[int, Image.Image], None] | None = None,
) -> tuple[SampleTable, dict[str, str]]:
    """Make sure that every image of the given splits can be decoded.

    Args:
        table: The samples.
        splits: Which to look at, in this order.
        skip_bad: Leave bad images out instead of failing.
        progress: Called as images are done.
        keep: See ``unreadable``; positions count through the splits in turn.

    Returns:
        The table without what was left out, and the reason for each image left out, by path.

    Raises:
        UadxError: An image cannot be decoded and ``skip_bad`` is not set; the message names it.
    """
    wanted = [table.paths[int(index)] for split in splits for index in table.where(split=split)]
    reasons = unreadable(wanted, progress, keep)
    if not reasons:
        return table, {}
    if not skip_bad:
        path, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise UadxError(
            f"{path}: {reason}{more}",
            "repair or remove it, or train with --skip-bad, which leaves such files out; see 'uadx data check'",
        )
    return table.without(set(reasons)), reasons


@dataclass(frozen=True)
class _Facts:
    size: tuple[int, int] | None
    format: str
    digest: str
    problem: str
    mask_problem: tuple[str, str] | None


def _inspect(sample: Sample) -> _Facts:
    try:
        with open_image(sample.path) as image:
            format_name = image.format or "?"
        rgb = read_rgb(sample.path)
    except ImageError as error:
        return _Facts(None, "?", "", error.message.removeprefix(f"{sample.path}: "), None)
    digest = hashlib.blake2b(f"{rgb.size}".encode() + rgb.tobytes(), digest_size=16).hexdigest()
    return _Facts(rgb.size, format_name, digest, "", _inspect_mask(sample, rgb.size))


def _inspect_mask(sample: Sample, size: tuple[int, int]) -> tuple[str, str] | None:
    if not sample.mask:
        return None
    try:
        mask = read_mask(sample.mask)
    except ImageError as error:
        return "mask-unreadable", error.message.removeprefix(f"{sample.mask}: ")
    if wrong := misfit(mask, (size[1], size[0])):
        return "mask-size", wrong
    if not mask.any():
        return "mask-empty", "mask of an anomalous image marks no pixel" if sample.label == ANOMALOUS else ""
    return None


def check_data(
    table: SampleTable,
    progress: Progress | None = None,
    *,
    left_out: Mapping[str, int] | None = None,
    exhaustive: bool = True,
) -> DataReport:
    """Decode every image and mask and report counts and problems.

    Args:
        table: The samples as a layout found them, nothing held out yet.
        progress: Called as images are done.
        left_out: Folders of images that the layout did not take, see ``layouts.left_out``.
        exhaustive: Every mask below the root is meant, see ``LayoutPlugin``: one that belongs to no image is a problem.
    """
    reports = {name: CategoryReport() for name in table.categories}
    problems: list[Problem] = []
    seen: dict[str, list[int]] = defaultdict(list)
    masked = set(table.masked_categories())
    with _pool() as pool:
        for index, facts in enumerate(_in_order(pool, _inspect, table)):
            sample = table[index]
            _count(reports[sample.category], sample, facts)
            problems.extend(_problems_of(table, index, facts, masked))
            if facts.digest:
                seen[facts.digest].append(index)
            if progress is not None:
                progress(index + 1, len(table))
    problems += [*_duplicates(table, seen), *_category_problems(table), *_folder_problems(table, exhaustive)]
    problems += [
        Problem(WARNING, "images-left-out", folder, f"images here that belong to no category: {number}")
        for folder, number in (left_out or {}).items()
    ]
    return DataReport(reports, sorted(problems, key=lambda p: (p.severity, p.kind, p.path)))


def _count(report: CategoryReport, sample: Sample, facts: _Facts) -> None:
    if sample.split == "test":
        if sample.label == NORMAL:
            report.test_normal += 1
        else:
            report.test_anomalous += 1
    else:
        setattr(report, sample.split, getattr(report, sample.split) + 1)
    report.masks += bool(sample.mask)
    if facts.size is not None:
        for counts, key in ((report.sizes, f"{facts.size[0]}x{facts.size[1]}"), (report.formats, facts.format)):
            counts[key] = counts.get(key, 0) + 1


def _problems_of(table: SampleTable, index: int, facts: _Facts, masked: set[str]) -> Iterator[Problem]:
    sample, path = table[index], table.relative(index)
    if facts.problem:
        yield Problem(WARNING if sample.split == "test" else ERROR, "unreadable", path, facts.problem)
    if sample.split == "train" and sample.label == ANOMALOUS:
        yield Problem(ERROR, "anomalous-in-training", path, "anomalous image in the training split")
    if facts.mask_problem and facts.mask_problem[1]:
        yield Problem(WARNING, facts.mask_problem[0], relative_to(sample.mask, table.root), facts.mask_problem[1])
    if sample.label == ANOMALOUS and not sample.mask and sample.category in masked:
        yield Problem(WARNING, "mask-missing", path, "anomalous image without a mask in a category with masks")


def _duplicates(table: SampleTable, seen: dict[str, list[int]]) -> Iterator[Problem]:
    for indices in seen.values():
        if len(indices) < 2:
            continue
        first = indices[0]
        for other in indices[1:]:
            parts = {table[first].split, table[other].split}
            kind = "duplicate-across-splits" if len(parts) == 2 else "duplicate"
            where = f" ({' and '.join(sorted(parts))})" if len(parts) == 2 else ""
            yield Problem(WARNING, kind, table.relative(other), f"same picture as {table.relative(first)}{where}")


def _category_problems(table: SampleTable) -> Iterator[Problem]:
    counts = Counter(s.category for s in table if s.split == "train" and s.label == NORMAL)
    if not counts:
        yield Problem(ERROR, "no-training-images", "", "no category has normal training images")
        return
    for category in table.categories:
        held_out = len(table.where(split="val", category=category, label=NORMAL))
        if counts[category] == 0:
            yield Problem(WARNING, "no-training-images", "", f"category '{category}' has no normal training images")
        elif counts[category] == 1 and not held_out:
            yield Problem(ERROR, "one-training-image", "", f"category '{category}' has one training image: none to hold out")
        elif counts[category] < 20:
            yield Problem(
                WARNING, "few-training-images", "", f"category '{category}' has {counts[category]} training images"
            )


def _folder_problems(table: SampleTable, exhaustive: bool) -> Iterator[Problem]:
    """Find folders that cannot be read, and masks of no image in the mask folders of the table's categories."""
    used = set(table.masks)
    pictures = set(table.paths)
    image_folders = {Path(path).parent for path in pictures}
    homes = image_folders.union(*(folder.parents for folder in image_folders))
    closed: dict[str, OSError] = {}
    strays: list[str] = []
    # Links are followed, as by the layouts.
    for folder, found in walk(table.root, closed.__setitem__):
        within = _mask_folder_of(Path(folder), table.root)
        # A mask of a good part, which marks nothing, may be there or not.
        if exhaustive and within is not None and within.parent in homes and not is_normal(Path(folder).name):
            strays += [path for path in found if path not in used and path not in pictures]
    for folder, error in closed.items():
        message = f"cannot be read: {error.strerror}; what is in it is left out"
        yield Problem(WARNING, "folder-unreadable", relative_to(folder, table.root), message)
    for path in sorted(strays):
        message = "mask belongs to no image, or by its name to two"
        yield Problem(WARNING, "mask-without-image", relative_to(path, table.root), message)


def _mask_folder_of(folder: Path, root: Path) -> Path | None:
    """Return the topmost mask folder below the root that a folder is in, or is."""
    above = [folder, *folder.parents][: len(folder.relative_to(root).parts)]
    return next((place for place in reversed(above) if place.name.lower() in MASK_FOLDERS), None)
