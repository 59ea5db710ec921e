"""Scoring the images of a folder as they arrive: nothing is lost, nothing is done twice. No torch in here."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import IO, Any

try:
    import fcntl
except ImportError:
    # Windows has no such locks; two watchers of one result are then not noticed.
    fcntl = None  # type: ignore[assignment]

from uad_plugins.data.layouts.walking import walk
from uad_plugins.detector import BATCH_SIZE, Detector
from uad_plugins.errors import UadxError, UsageError, unknown_name
from uad_plugins.evaluation.predict import predict

RESULTS = "predictions.jsonl"
MAPS = "maps"
INTERVAL = 0.5
"""Seconds between two looks at the folder."""

PATIENCE = 10.0
"""Seconds without a change after which an image that cannot be decoded is taken for bad, not for half-written."""

BACKLOG = 64
"""Images handed to the detector at once: the ones after them wait, so that a stop is obeyed soon."""

MEMORY = 24 * 3600.0
"""Seconds for which an image that is gone is still known: it may be on a share that comes back."""

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: with its path it tells an image from a later one there."""


@dataclass
class _Seen:
    stamp: Stamp
    since: float
    failed: bool = False


@dataclass
class _Done:
    """Images that have a row, by path; those that are gone since when."""

    stamps: dict[str, Stamp] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)


@dataclass
class Watch:
    """A folder that is watched.

    Attributes:
        folder: Where images arrive, at any depth.
        out: Where ``predictions.jsonl`` and ``maps/`` are written; not below ``folder``.
        category: The product shown in all of them; None takes the pooled threshold.
        stop: Set it to end after the image that is being scored.
        interval: Seconds between two looks.
        patience: Seconds without a change after which an undecodable image gets an error.
        batch_size: Images scored together.
        memory: Seconds for which an image that is gone is still known.
        tell: Called with remarks.
    """

    folder: Path
    out: Path
    category: str | None = None
    stop: Event = field(default_factory=Event)
    interval: float = INTERVAL
    patience: float = PATIENCE
    batch_size: int = BATCH_SIZE
    memory: float = MEMORY
    tell: Callable[[str], None] = lambda _: None
    _told: set[str] = field(default_factory=set, init=False)

    def run(self, detector: Detector) -> Iterator[dict[str, Any]]:
        """Score images until ``stop`` is set.

        Every row is on the disk before it is yielded: a row as ``uadx predict`` writes it, with the image's ``bytes`` and
        ``changed`` (nanoseconds). After a restart what has a row is left alone, unless the file has changed since. Paths
        are those of the folder itself, however it was spelt: links to it lead to the same rows.

        Raises:
            UadxError: The folder is missing at the start, another watcher writes to ``out``, or the disk is full.
            UsageError: Folder and ``out`` lie in one another, or the category is unknown.
        """
        if self.category is not None and self.category not in detector.categories:
            raise unknown_name("category", self.category, detector.categories)
        if not self.folder.is_dir():
            raise UadxError(f"{self.folder}: no such folder", "make it first; images are scored as they arrive there")
        folder = self.folder.resolve()
        # A link there may lead elsewhere: where the maps really go counts too.
        out, maps = self.out.resolve(), (self.out / MAPS).resolve()
        if _within(out, folder) or _within(maps, folder):
            raise UsageError(f"{self.out} lies in the folder that is watched", "results need a folder of their own")
        if _within(folder, maps):
            raise UsageError(f"{self.folder} lies in the folder of the heat maps", "results need a folder of their own")
        out.mkdir(parents=True, exist_ok=True)
        with _results(out / RESULTS) as (results, done):
            seen: dict[str, _Seen] = {}
            while not self.stop.is_set():
                started = time.monotonic()
                there = self._look(folder, maps)
                if there is None:
                    continue
                _forget(there, seen, done, self.memory)
                scored = False
                for row in self._score(detector, self._ready(there, seen, done, started), folder, seen):
                    _append(results, row)
                    done.stamps[row["path"]] = (row["bytes"], row["changed"])
                    del seen[row["path"]]
                    scored = True
                    yield row
                    if self.stop.is_set():
                        return
                if not scored:
                    self.stop.wait(self.interval)

    def _look(self, folder: Path, maps: Path) -> dict[str, Stamp] | None:
        """Return the images that are there now; None when the folder cannot be read: a share may come back."""
        try:
            stamps = {path: _stamp(path) for path in self._images(folder, maps)}
        except OSError as error:
            self._remark(str(folder), f"{self.folder}: cannot be read now ({error.strerror}); trying again")
            self.stop.wait(self.interval)
            return None
        return {path: stamp for path, stamp in stamps.items() if stamp is not None}

    def _images(self, folder: Path, maps: Path) -> Iterator[str]:
        """Yield the image files below the folder; hidden ones, and what was written by the watcher itself, are left out.

        Every folder is visited once, however many links lead to it, by its own name where it has one. A folder below that
        cannot be read hides no other.

        Raises:
            OSError: The folder itself cannot be read.
        """

        def unreadable(place: str, error: OSError) -> None:
            self._remark(place, f"{place}: left out, it cannot be read ({error.strerror})")

        for place, found in walk(folder, unreadable, lambda real: not _within(Path(real), maps)):
            self._told.discard(place)
            yield from found

    def _remark(self, about: str, text: str) -> None:
        """Say something of a folder once, until it could be read again."""
        if about not in self._told:
            self._told.add(about)
            self.tell(text)

    def _ready(self, there: dict[str, Stamp], seen: dict[str, _Seen], done: _Done, started: float) -> list[str]:
        """Return a backlog of images that were the same at two looks, an interval apart at least, oldest first.

        Args:
            there: The images at this look.
            seen: Those without a row, when they were first seen as they are.
            done: Those with a row.
            started: When this look began.
        """
        now, ready = time.monotonic(), []
        for path, stamp in there.items():
            if done.stamps.get(path) == stamp:
                continue
            state = seen.get(path)
            if state is None or state.stamp != stamp:
                seen[path] = _Seen(stamp, now)
            elif started - state.since >= (self.patience if state.failed else self.interval):
                ready.append(path)
        return sorted(ready, key=lambda path: (there[path][1], path))[:BACKLOG]

    def _score(self, detector: Detector, ready: list[str], folder: Path, seen: dict[str, _Seen]) -> Iterator[dict[str, Any]]:
        """Yield the rows of images that are whole: with a result, or with an error that will not go away."""
        if not ready:
            return
        names = {path: f"{os.path.relpath(path, folder)}.png" for path in ready}
        rows = predict(detector, ready, category=self.category, out=self.out / MAPS, names=names, batch_size=self.batch_size)
        for row in rows:
            path, state = row["path"], seen[row["path"]]
            stamp = _stamp(path)
            if stamp is not None and stamp != state.stamp:
                # It grew while it was read.
                seen[path] = _Seen(stamp, time.monotonic())
            elif stamp is not None and row["error"] and time.monotonic() - state.since < self.patience:
                state.failed = True
            elif stamp is not None:
                yield {**row, "bytes": stamp[0], "changed": stamp[1]}


def _within(inner: Path, outer: Path) -> bool:
    """Tell whether a resolved path is another one, or lies below it."""
    return inner == outer or outer in inner.parents


def _forget(there: dict[str, Stamp], seen: dict[str, _Seen], done: _Done, memory: float) -> None:
    """Drop what is gone from the folder: memory must not grow with all that was ever there.

    What has a row is known for a while longer. An empty folder says nothing: it may be where a share is not mounted. Then
    nothing counts as gone from now on, nothing is dropped, and what was gone before is so since then.
    """
    for path in [path for path in seen if path not in there]:
        del seen[path]
    if not there:
        return
    now = time.monotonic()
    done.gone = {path: done.gone.get(path, now) for path in done.stamps if path not in there}
    for path in [path for path, since in done.gone.items() if now - since >= memory]:
        del done.stamps[path], done.gone[path]


def _stamp(path: str) -> Stamp | None:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _results(path: Path) -> Iterator[tuple[IO[bytes], _Done]]:
    """Open the results for this process alone; yield the file, and what has a row already.

    A last line that was cut off by a power cut is removed: its image will be scored again.
    """
    with path.open("ab+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UadxError(f"{path}: another watcher is writing to it", "stop it, or name another --out") from None
        done = _Done()
        end = 0
        file.seek(0)
        for line in file:
            try:
                row = json.loads(line)
                done.stamps[row["path"]] = (int(row["bytes"]), int(row["changed"]))
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    raise UadxError(f"{path}: is not a watcher's file, or is damaged", "name another --out") from None
                break
            if not line.endswith(b"\n"):
                break
            end += len(line)
        file.truncate(end)
        yield file, done


def _append(results: IO[bytes], row: dict[str, Any]) -> None:
    """Write a row so that it survives a power cut."""
    try:
        results.write((json.dumps(row, allow_nan=False) + "\n").encode())
        results.flush()
        os.fsync(results.fileno())
    except OSError as error:
        raise UadxError(f"{results.name}: cannot be written: {error.strerror}", "make room; then start it again") from None
