"""The run's folder before training: is it new, unfinished or finished, and does a resumed training fit to it."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:
    # Windows has no such locks; two trainings to one folder are then not noticed.
    fcntl = None  # type: ignore[assignment]

from uad_plugins.artifacts import MANIFEST, Run, RunManifest, write_json, write_text
from uad_plugins.config import TrainConfig, read_yaml, to_yaml, validate
from uad_plugins.data.samples import SampleTable, held_out_of
from uad_plugins.errors import UadxError, UsageError

DATA_MAY_CHANGE = ("num_workers", "eval_batch_size", "skip_bad")
RESUME_MAY_CHANGE = ("trainer", "plugins", "thresholds", *(f"data.{key}" for key in DATA_MAY_CHANGE))
"""Keys (and sections) that a resumed training may change."""


def main_process() -> bool:
    """Tell whether this is the process that writes: the first of a training on several devices or machines."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"))
    return all(rank in {"", "0"} for rank in ranks)


def own_place(out: Path) -> Path:
    """Return where a folder to write to lies, absolute: where the link leads, if it is one, so that the link stays."""
    folder = out.expanduser().absolute()
    return folder.resolve() if folder.is_symlink() else folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; another one that would write to it is refused meanwhile.

    Raises:
        UadxError: Another process holds it, or nothing can be written beside it.
    """
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        opened = None if fcntl is None or not main_process() else path.open("w")
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError):
            hint = "a file is where a folder is needed: name another place"
        else:
            example = f"name one inside a folder of yours, such as {folder}/run"
            hint = f"what is written to a folder is made ready beside it: {example}"
        raise UadxError(f"{folder.parent}: cannot be written to: {error.strerror}", hint) from error
    if opened is None:
        yield
        return
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, file):
                raise BlockingIOError
        except BlockingIOError:
            raise UadxError(f"{folder}: another process is writing to it", "wait for it, or name another folder") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_still(path: Path, file: IO[str]) -> bool:
    """Tell whether a path leads to an open file: whoever held the lock has deleted it, and another may have a new one."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def cache_path(folder: Path) -> Path:
    """Return where decoded images are kept while a run is trained: beside it, so that it survives the run's replacement."""
    return folder.parent / f".{folder.name}.pixels"


def check_folder(run: Run, *, resume: bool, overwrite: bool) -> None:
    """Decide whether a training may write to the folder; nothing is changed yet.

    Raises:
        UadxError: It holds something that was not asked to be continued or overwritten.
        UsageError: Both were asked for.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other", "give one of them")
    folder = run.folder
    if not main_process() or not folder.exists():
        return
    if not folder.is_dir():
        raise UadxError(f"{folder}: is a file", "name a folder for the run")
    if not (folder / MANIFEST).is_file():
        if _interrupted_start(run):
            return
        raise UadxError(f"{folder}: is not empty and holds no run", "name a new folder")
    if overwrite or resume:
        return
    if run.manifest().status == "finished":
        raise UadxError(
            f"{folder}: holds a finished run",
            "name a new folder, or replace it with --overwrite, or train on with --resume",
        )
    raise UadxError(f"{folder}: holds an unfinished run", "continue it with --resume, or replace it with --overwrite")


def _interrupted_start(run: Run) -> bool:
    """Tell whether a folder without a manifest holds nothing but what ``write_start`` writes before it."""
    names = {path.name for path in run.folder.iterdir() if not (path.name.startswith(".") and path.name.endswith(".part"))}
    if not names:
        return True
    # The first of all: a configuration that somebody has written by hand stands alone.
    if run.skipped_file.name not in names or not names <= {run.config_file.name, run.skipped_file.name, run.split_file.name}:
        return False
    try:
        return run.config_file.name not in names or bool(validate(read_yaml(run.config_file)))
    except UadxError:
        # Somebody else's.
        return False


def write_start(
    run: Run, config: TrainConfig, manifest: RunManifest, table: SampleTable, skipped: Mapping[str, str], *, fresh: bool
) -> None:
    """Make the folder ready for the first step: everything that could go wrong before it has gone right.

    Args:
        run: The run.
        config: Its resolved configuration.
        manifest: Its manifest.
        table: The samples of its training.
        skipped: Images left out.
        fresh: Begin anew; what is there is replaced.
    """
    if fresh:
        discard(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    # What a killed training was writing; it never got its name.
    for leftover in run.folder.glob(".*.part"):
        leftover.unlink()
    write_json(run.skipped_file, dict(skipped))
    write_text(run.config_file, to_yaml(config))
    if fresh or not run.split_file.is_file():
        # Never written anew: an image that has become unreadable is none that was trained on.
        write_json(run.split_file, {"val": sorted(held_out_of(table))})
    run.write_manifest(manifest)


def discard(folder: Path) -> None:
    """Delete a folder; another process never sees half of it.

    Raises:
        UadxError: It cannot be moved away, as one that is mounted.
    """
    prefix = f".{folder.name}.replaced."
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        # Of a call that was killed while it deleted.
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists() and any(folder.iterdir()):
        doomed = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            os.replace(folder, doomed)  # noqa: PTH105
        except OSError as error:
            doomed.rmdir()
            raise UadxError(
                f"{folder}: cannot be replaced: {error.strerror}",
                f"empty it, or name a folder inside it, such as {folder}/run",
            ) from error
        shutil.rmtree(doomed)


def resumed_config(run: Run, given: Mapping[str, Any], resolved: TrainConfig) -> TrainConfig:
    """Return the configuration of a resumed training: the stored one, with what may change taken from what is given.

    Args:
        run: The unfinished run.
        given: What the user said explicitly (file, environment and flags).
        resolved: The same, resolved with all defaults.

    Raises:
        UsageError: A key that must not change was given another value.
    """
    stored = run.config()
    before, after = stored.model_dump(), resolved.model_dump()
    merged = stored.model_copy(deep=True)
    for path in _leaves(given):
        name = ".".join(path)
        if any(name == key or name.startswith(f"{key}.") for key in RESUME_MAY_CHANGE):
            continue
        if _at(before, path) != _at(after, path):
            raise UsageError(
                f"a resumed training keeps its configuration: {name} is {_at(before, path)!r}, not {_at(after, path)!r}",
                "leave the flag out, or train to another folder",
            )
    # The section's own recipe must not undo what the first call set: only what is said now changes.
    merged.trainer = {**stored.trainer, **dict(given.get("trainer") or {})}
    for key in DATA_MAY_CHANGE:
        if key in (given.get("data") or {}):
            setattr(merged.data, key, getattr(resolved.data, key))
    for key in given.get("thresholds") or {}:
        setattr(merged.thresholds, key, getattr(resolved.thresholds, key))
    if "plugins" in given:
        merged.plugins = list(dict.fromkeys([*stored.plugins, *resolved.plugins]))
    return merged


def check_epochs(run: Run, done: int, max_epochs: int | None) -> None:
    """Refuse to resume for fewer epochs than were trained: the run would claim that it had these alone.

    Raises:
        UsageError: See above.
    """
    if max_epochs is not None and max_epochs < done:
        raise UsageError(
            f"{run.folder}: {done} epochs are trained already, not {max_epochs}",
            f"give --epochs {done} or more, or train to another folder",
        )


def check_same_data(manifest: RunManifest, table: SampleTable) -> None:
    """Refuse to resume on other data than the training began with.

    Raises:
        UadxError: Images were added, removed or moved: what was held out might now be trained on.
    """
    if manifest.data.get("fingerprint") != table.fingerprint():
        raise UadxError(
            "the data is not what this training began with (images added, removed or moved)",
            "put it back as it was, or train anew to another folder",
        )


def check_same_specialists(manifest: RunManifest, record: Mapping[str, Any]) -> None:
    """Refuse to resume with other specialists than the training began with.

    Args:
        manifest: Of the unfinished run.
        record: What the model that is to go on notes of itself: ``DistillationRecipe.run_record``.

    Raises:
        UadxError: One was added, removed or exchanged: the student would be taught something else from here on.
    """
    if record.get("specialists") != manifest.method.get("specialists"):
        raise UadxError(
            "the specialists are not those that this training began with (runs added, removed or exchanged)",
            "put them back as they were (run.json names their checkpoints), or train anew to another folder",
        )


def _leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        tree = tree.get(step) if isinstance(tree, Mapping) else None
    return tree
