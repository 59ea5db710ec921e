"""A bundle on disk, as a folder or a single ``.zip``: verified before anything in it is parsed. No torch in here."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from uad_plugins.artifacts import atomic_path, cache_folder, sha256_of
from uad_plugins.deployment.manifest import MANIFEST, BundleFile, BundleManifest, complaint, outside, parse
from uad_plugins.errors import UadxError, UsageError, reason_of
from uad_plugins.evaluation.thresholds import Thresholds

MAX_MANIFEST = 1 << 24
MAX_BYTES = 1 << 33
"""Of all files of a zip, unpacked."""
MAX_RATIO = 100
"""Of unpacked to packed: a model packs to half of its size at best, what packs to a hundredth is a trap."""

MADE_ON_THE_DEVICE = ("engine",)
"""Folders below a bundle that belong to the machine it runs on: TensorRT's engines are built there."""

ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""What ``zipfile`` raises on damaged files."""

COPY_AGAIN = "copy the bundle again"
OTHER_CACHE = "set UADX_CACHE to a folder that can be written, or unpack the zip and give its folder"
DISTRUST = "do not use it; copy the bundle from where it was made"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        folder: Where its files lie: the folder itself, or what a zip was unpacked to.
        manifest: What ``bundle.json`` says.
        name: What was opened, for messages.
    """

    folder: Path
    manifest: BundleManifest
    name: str

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle; every file is compared with the manifest before it is used.

        A zip is unpacked into the user's cache folder once, under the hash of its manifest.

        Raises:
            UadxError: It is no bundle, of a newer version, or not what was written.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            return _open_folder(path, str(path))
        if zipfile.is_zipfile(path):
            return _open_zip(path)
        if not path.exists():
            raise UadxError(f"{path}: no such file or folder", "give what 'uadx deploy --out' wrote")
        raise UadxError(f"{path}: neither a folder nor a zip file, or a truncated one", COPY_AGAIN)

    @property
    def thresholds(self) -> Thresholds:
        """Decision thresholds."""
        return self.manifest.thresholds.thresholds()

    def file(self, name: str) -> Path:
        """Return where a file of the manifest lies."""
        return self.folder / name


def is_bundle(path: Path) -> bool:
    """Tell by names alone whether this is meant to be a bundle; what is wrong with it, opening it will say."""
    if path.is_dir():
        return (path / MANIFEST).is_file()
    if path.suffix.lower() != ".zip" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except (zipfile.BadZipFile, OSError):
        # A zip that was cut off has lost its directory: nothing else here reads a .zip.
        return True


def read_manifest(path: Path) -> BundleManifest:
    """Return what ``bundle.json`` says, its own seal verified; the other files are neither looked at nor vouched for.

    Raises:
        UadxError: It is damaged or of a newer version.
    """
    if path.is_dir():
        return _manifest_of(path, str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            return _manifest_in(archive, path)[0]
    except ZIP_DAMAGE as error:
        raise UadxError(f"{path}: damaged: {error}", COPY_AGAIN) from None


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends without an error.

    Args:
        out: Folder, or file ending in ``.zip``.
        overwrite: Replace a bundle that is there.

    Raises:
        UadxError: There is something that was not asked to be replaced, or is no bundle.
    """
    check_place(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    fresh = work / "bundle"
    fresh.mkdir()
    try:
        yield fresh
        if out.suffix.lower() == ".zip":
            _pack(fresh, out)
        else:
            _sync(fresh)
            aside, replacing = _aside(out), out.exists()
            if replacing:
                out.replace(aside)
            try:
                fresh.replace(out)
            except BaseException:
                if replacing:
                    aside.replace(out)
                raise
            if replacing:
                # Renamed before it is deleted: half a bundle must never be taken for one to put back.
                aside.replace(work / "before")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _aside(out: Path) -> Path:
    """Return where a bundle lies while another takes its place."""
    return out.with_name(f".{out.name}.before")


def _put_back(out: Path) -> None:
    """Undo or finish a replacement that was killed between its two renames."""
    aside = _aside(out)
    if is_bundle(aside):
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.replace(out)


def check_place(out: Path, *, overwrite: bool) -> None:
    """Decide whether a bundle may be written there; what a killed replacement has left aside is put back first.

    Raises:
        UadxError: There is something else, or a bundle that was not asked to be replaced.
        UsageError: A file with another ending than ``.zip``, or a folder with that ending.
    """
    _put_back(out)
    if out.is_dir() and out.suffix.lower() == ".zip":
        raise UsageError(f"{out}: is a folder", "a name that ends in .zip is for a file: choose another")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.is_file() and out.suffix.lower() != ".zip":
        raise UsageError(f"{out}: is a file", "name a folder, or a file ending in .zip")
    if not is_bundle(out):
        raise UadxError(f"{out}: exists and is not a bundle", "name a new folder")
    if not overwrite:
        raise UadxError(f"{out}: holds a bundle", "name a new place, or replace it with --overwrite")


def seal(folder: Path, manifest: BundleManifest) -> BundleManifest:
    """Write ``bundle.json`` over the files that lie in a folder, and return it with their hashes.

    Args:
        folder: A staged bundle.
        manifest: All but the files.

    Raises:
        UadxError: A file has a name that a bundle must not hold.
    """
    files = {
        name: BundleFile(sha256=sha256_of(folder / name), bytes=(folder / name).stat().st_size) for name in _listed(folder)
    }
    for name in files:
        wrong = complaint(name)
        if wrong:
            raise UadxError(f"'{name}' {wrong}", "a fault of the target that packaged it")
    text = manifest.model_copy(update={"files": files}).text()
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return parse(text.encode(), str(folder))


def _listed(folder: Path) -> list[str]:
    """Return the files below a folder but the manifest, and what the device or Python put there."""
    found = []
    for root, folders, names in os.walk(folder):
        place = Path(root)
        for name in [*folders, *names]:
            if (place / name).is_symlink():
                raise UadxError(f"{place / name}: a bundle holds no links", COPY_AGAIN)
        folders[:] = [
            name for name in folders if name != "__pycache__" and not (place == folder and name in MADE_ON_THE_DEVICE)
        ]
        found += [(place / name).relative_to(folder).as_posix() for name in names]
    return sorted(set(found) - {MANIFEST})


def _manifest_of(folder: Path, name: str) -> BundleManifest:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise UadxError(f"{name}: not a bundle (no {MANIFEST})", "give what 'uadx deploy --out' wrote")
    if path.stat().st_size > MAX_MANIFEST:
        raise UadxError(f"{name}: {MANIFEST} is too large to be one", COPY_AGAIN)
    return parse(path.read_bytes(), name)


def _open_folder(folder: Path, name: str) -> Bundle:
    manifest = _manifest_of(folder, name)
    there = set(_listed(folder))
    for missing in sorted(set(manifest.files) - there):
        raise UadxError(f"{name}: '{missing}' is missing", COPY_AGAIN)
    for extra in sorted(there - set(manifest.files)):
        raise UadxError(f"{name}: '{extra}' does not belong to it", "remove it, or copy the bundle again")
    for file, facts in manifest.files.items():
        size = (folder / file).stat().st_size
        if size != facts.bytes:
            raise UadxError(f"{name}: '{file}' has {size} bytes instead of {facts.bytes}", COPY_AGAIN)
        if sha256_of(folder / file) != facts.sha256:
            raise UadxError(f"{name}: '{file}' is not what was written: its content has changed", COPY_AGAIN)
    return Bundle(folder, manifest, name)


def _manifest_in(archive: zipfile.ZipFile, path: Path) -> tuple[BundleManifest, bytes, dict[str, zipfile.ZipInfo]]:
    members = _members(archive, path)
    if MANIFEST not in members:
        raise UadxError(f"{path}: not a bundle (no {MANIFEST})", "give what 'uadx deploy --out' wrote")
    raw = _content(archive, members[MANIFEST], MAX_MANIFEST, str(path))
    return parse(raw, str(path)), raw, members


def _open_zip(path: Path) -> Bundle:
    name = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            manifest, raw, members = _manifest_in(archive, path)
            for missing in sorted(set(manifest.files) - set(members)):
                raise UadxError(f"{name}: '{missing}' is missing", COPY_AGAIN)
            for extra in sorted(set(members) - set(manifest.files) - {MANIFEST}):
                raise UadxError(f"{name}: '{extra}' does not belong to it", COPY_AGAIN)
            for file, facts in manifest.files.items():
                if members[file].file_size != facts.bytes:
                    raise UadxError(f"{name}: '{file}' has {members[file].file_size} bytes, not {facts.bytes}", COPY_AGAIN)
            try:
                folder = cache_folder("bundles") / manifest.seal
                if folder.is_dir():
                    # A copy that is damaged says nothing about the zip.
                    with contextlib.suppress(UadxError):
                        return _open_folder(folder, name)
                _unpack(archive, members, manifest, raw, folder, name)
            except OSError as error:
                raise UadxError(f"{name}: cannot be unpacked into the cache: {reason_of(error)}", OTHER_CACHE) from None
    except ZIP_DAMAGE as error:
        raise UadxError(f"{name}: damaged: {error}", COPY_AGAIN) from None
    return Bundle(folder, manifest, name)


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return what a zip holds, refusing names and sizes before a byte is unpacked."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name, mode = info.filename, info.external_attr >> 16
        # Python strips what follows a zero byte, and turns a backslash on Windows: the name as it is stored decides.
        stored = info.orig_filename
        wrong = outside(stored) if info.is_dir() else complaint(stored)
        if stored != MANIFEST and wrong:
            raise UadxError(f"{path}: '{stored}' {wrong}", DISTRUST)
        if info.is_dir() and info.file_size == 0:
            # What packs a folder again writes entries for folders: they hold nothing.
            continue
        if stat.S_IFMT(mode) not in {0, stat.S_IFREG}:
            raise UadxError(f"{path}: '{name}' is a link or a device", DISTRUST)
        if name in found:
            raise UadxError(f"{path}: '{name}' is in it twice", DISTRUST)
        if info.flag_bits & 1:
            raise UadxError(f"{path}: '{name}' is encrypted", COPY_AGAIN)
        found[name] = info
    total = sum(info.file_size for info in found.values())
    if total > MAX_BYTES or total > MAX_RATIO * max(path.stat().st_size, 1):
        raise UadxError(f"{path}: would unpack to {total} bytes, which no bundle does", "do not use it")
    return found


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int, name: str) -> bytes:
    with archive.open(info) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise UadxError(f"{name}: {info.filename} is too large to be one", COPY_AGAIN)
    return raw


def _unpack(
    archive: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    manifest: BundleManifest,
    raw: bytes,
    folder: Path,
    name: str,
) -> None:
    """Unpack a zip to a folder that is there once its content is verified, and on the disk."""
    work = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        fresh = work / "bundle"
        fresh.mkdir()
        (fresh / MANIFEST).write_bytes(raw)
        for file_name, facts in manifest.files.items():
            target = fresh / file_name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(members[file_name]) as source, target.open("wb") as file:
                _copy(source, file, facts.bytes)
        _open_folder(fresh, name)
        _sync(fresh)
        if folder.is_dir():
            folder.replace(work / "damaged")
        try:
            fresh.replace(folder)
        except OSError:
            # Another process was faster; what it unpacked is verified like any folder.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    """Copy at most ``size`` bytes, whatever the header of the archive says."""
    while size > 0 and (block := source.read(min(size, 1 << 20))):
        target.write(block)
        size -= len(block)


def _pack(folder: Path, out: Path) -> None:
    """Write a folder as a zip: the same files give the same bytes."""
    with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in [MANIFEST, *_listed(folder)]:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, (stat.S_IFREG | 0o644) << 16
            with (folder / name).open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _sync(folder: Path) -> None:
    """Have all content on the disk before the name is."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
