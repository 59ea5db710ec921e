"""A bundle on disk: what is refused, with one line each, before anything in it is parsed."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from uad_plugins.deployment.bundle import Bundle, check_place, is_bundle, seal, staged
from uad_plugins.deployment.manifest import MANIFEST, UNSEALED, complaint, parse
from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("UADX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle to be damaged."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def packed(folder, path, change=lambda name, content: content, extra=()):
    """Zip a bundle, changing contents on the way."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                name = file.relative_to(folder).as_posix()
                content = change(name, file.read_bytes())
                if content is not None:
                    archive.writestr(name, content)
        for info, content in extra:
            archive.writestr(info, content)
    return path


def sealed(content):
    """A manifest with its seal: what someone could write who knows how."""
    blank = json.dumps({**content, "seal": UNSEALED})
    return blank.replace(UNSEALED, hashlib.sha256(blank.encode()).hexdigest(), 1).encode()


def refused(path, *words):
    with pytest.raises(UadxError) as caught:
        Bundle.open(path)
    error = caught.value
    assert len(error.message.splitlines()) == 1
    assert error.hint
    assert str(path) in error.message
    for word in words:
        assert word in error.message
    return error


def test_a_folder_and_its_zip_hold_the_same(bundle, tmp_path):
    folder = Bundle.open(bundle)
    zipped = Bundle.open(packed(bundle, tmp_path / "b.zip"))
    assert zipped.manifest == folder.manifest
    assert set(folder.manifest.files) >= {"model.xml", "model.bin", "README.md"}
    for name in folder.manifest.files:
        assert zipped.file(name).read_bytes() == folder.file(name).read_bytes()
    assert is_bundle(bundle)
    assert is_bundle(tmp_path / "b.zip")


def test_a_zip_is_unpacked_once_into_the_cache(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = packed(bundle, tmp_path / "b.zip")
    first = Bundle.open(path).folder
    (seen,) = (tmp_path / "cache" / "bundles").iterdir()
    assert first == seen
    before = (seen / "model.bin").stat().st_mtime_ns
    Bundle.open(path)
    assert (seen / "model.bin").stat().st_mtime_ns == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b.zip", "cache"]


def test_a_damaged_copy_in_the_cache_is_unpacked_again(bundle, tmp_path):
    path = packed(bundle, tmp_path / "b.zip")
    folder = Bundle.open(path).folder
    for damage in (
        lambda: (folder / "model.bin").write_bytes(b"other"),
        lambda: (folder / "bundle.json").unlink(),
        lambda: (folder / "more.txt").touch(),
    ):
        damage()
        assert Bundle.open(path).folder == folder
        Bundle.open(folder)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_what_is_unpacked_is_on_the_disk_before_it_has_its_name(bundle, tmp_path, monkeypatch):
    synced, real, replace = [], os.fsync, Path.replace

    def noting(handle):
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    def renaming(self, target):
        assert "model.bin" in synced
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "replace", renaming)
    Bundle.open(packed(bundle, tmp_path / "b.zip"))


def test_a_cache_that_cannot_be_written_is_said(bundle, tmp_path, monkeypatch):
    path = packed(bundle, tmp_path / "b.zip")
    (tmp_path / "file").touch()
    monkeypatch.setenv("UADX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UadxError, match=r"b\.zip: cannot be unpacked into the cache: .*file") as caught:
        open_detector(path)
    assert "UADX_CACHE" in caught.value.hint
    monkeypatch.delenv("UADX_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: "~/.cache/uadx")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UadxError, match="no home folder for the cache"):
        open_detector(path)
    assert not (tmp_path / "~").exists()


def test_entries_for_folders_in_a_zip_do_not_matter(bundle, tmp_path):
    path = packed(bundle, tmp_path / "b.zip", extra=[(zipfile.ZipInfo("pictures/"), b""), (zipfile.ZipInfo("a/b/"), b"")])
    assert Bundle.open(path).manifest == Bundle.open(bundle).manifest
    for name in ("../evil/", "/evil/"):
        refused(packed(bundle, tmp_path / "c.zip", extra=[(zipfile.ZipInfo(name), b"")]), "lies outside the bundle")


def test_each_file_is_hashed_once(bundle, tmp_path, monkeypatch):
    from uad_plugins.deployment import bundle as module

    hashed, real = [], module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    zipped = packed(bundle, tmp_path / "b.zip")
    for place in (bundle, zipped, zipped):
        hashed.clear()
        with open_detector(place):
            assert hashed.count("model.bin") == 1


@pytest.mark.parametrize("name", ["model.bin", "model.xml", "README.md"])
def test_a_changed_byte_is_refused(copy, tmp_path, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    refused(copy, name, "its content has changed")
    refused(packed(copy, tmp_path / "b.zip"), name, "its content has changed")


@pytest.mark.parametrize("place", [0.1, 0.35, 0.5, 0.8, 0.99])
def test_a_changed_byte_of_the_manifest_is_refused(copy, place):
    raw = bytearray((copy / MANIFEST).read_bytes())
    raw[int(place * len(raw))] ^= 1
    (copy / MANIFEST).write_bytes(raw)
    refused(copy, MANIFEST)


def test_even_a_blank_of_the_manifest_counts(copy):
    path = copy / MANIFEST
    path.write_text(path.read_text().replace("\n  ", "\n   ", 1))
    refused(copy, "its content has changed")


def test_a_truncated_file_is_refused(copy, tmp_path):
    content = (copy / "model.bin").read_bytes()
    (copy / "model.bin").write_bytes(content[: len(content) // 2])
    refused(copy, "'model.bin' has", f"instead of {len(content)}")
    path = packed(copy, tmp_path / "b.zip")
    refused(path, "'model.bin' has")


def test_a_truncated_zip_is_refused(bundle, tmp_path):
    path = packed(bundle, tmp_path / "b.zip")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "truncated")
    assert is_bundle(path)


def test_a_zip_with_a_damaged_stream_is_refused(bundle, tmp_path):
    path = packed(bundle, tmp_path / "b.zip")
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 64] = bytes(64)
    path.write_bytes(raw)
    refused(path)


def test_missing_and_additional_files_are_refused(copy, tmp_path):
    (copy / "notes.txt").write_text("mine")
    refused(copy, "'notes.txt' does not belong to it")
    refused(packed(copy, tmp_path / "b.zip"), "'notes.txt' does not belong to it")
    (copy / "notes.txt").unlink()
    (copy / "model.xml").unlink()
    refused(copy, "'model.xml' is missing")
    refused(packed(copy, tmp_path / "c.zip"), "'model.xml' is missing")


def test_what_the_device_makes_does_not_count(copy):
    (copy / "engine").mkdir()
    (copy / "engine" / "model.engine").write_bytes(b"plan")
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "runner.pyc").write_bytes(b"")
    Bundle.open(copy)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("uadx.bundle/2", "newer schema uadx.bundle/2"),
        ("uadx.bundle/9999", "newer schema"),
        ("uadx.bundle/0", "is not the manifest of a bundle"),
        ("uadx.run/1", "is not the manifest of a bundle"),
        (None, "is not the manifest of a bundle"),
    ],
)
def test_another_schema_is_refused(copy, tmp_path, schema, words):
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**content, "schema": schema}))
    error = refused(copy, words)
    assert ("update uadx" in error.hint) == ("newer" in words)
    refused(packed(copy, tmp_path / "b.zip"), words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_none_is_refused(copy, content):
    (copy / MANIFEST).write_bytes(content)
    refused(copy, MANIFEST)


@pytest.mark.parametrize(
    "name",
    ["../evil.xml", "/etc/evil.json", "a/../../evil.xml", "C:/evil.xml", "a\\..\\evil.xml", "./model.xml", "a//b.xml", ""],
)
def test_a_path_out_of_the_bundle_is_refused(bundle, tmp_path, name):
    assert complaint(name)
    raw = (bundle / MANIFEST).read_text()
    content = json.loads(raw)
    content["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    with pytest.raises(UadxError, match="lies outside|is not a plain name"):
        parse(sealed(content), "b")
    if name:
        path = packed(bundle, tmp_path / "b.zip", extra=[(zipfile.ZipInfo(name), b"evil")])
        refused(path)
        assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("name", ["model.pkl", "weights.pt", "model.ckpt", "data.pickle", "run.sh", "model"])
def test_only_files_of_known_kinds_are_in_a_bundle(copy, name):
    (copy / name).write_bytes(b"\x80\x04.")
    manifest = parse((copy / MANIFEST).read_bytes(), "b")
    with pytest.raises(UadxError, match="is of a kind that a bundle does not hold"):
        seal(copy, manifest)


def test_links_are_refused(copy, tmp_path):
    (tmp_path / "outside.xml").write_bytes((copy / "model.xml").read_bytes())
    (copy / "model.xml").unlink()
    (copy / "model.xml").symlink_to(tmp_path / "outside.xml")
    refused(copy, "holds no links")


def test_links_and_copies_in_a_zip_are_refused(bundle, tmp_path):
    link = zipfile.ZipInfo("pictures/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(packed(bundle, tmp_path / "link.zip", extra=[(link, b"/etc/passwd")]), "is a link or a device")
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = packed(bundle, tmp_path / "twice.zip", extra=[("model.xml", b"other")])
    refused(path, "'model.xml' is in it twice")


def test_a_bomb_is_refused_before_it_is_unpacked(bundle, tmp_path):
    path = packed(bundle, tmp_path / "b.zip", lambda name, raw: bytes(1 << 27) if name == "model.bin" else raw[:1])
    refused(path, "would unpack to")
    assert not (tmp_path / "cache").exists()


def test_a_zip_that_says_less_than_it_holds_unpacks_no_more_than_the_manifest_says(bundle, tmp_path):
    """The sizes in the directory of a zip are whoever made it's word."""
    path = packed(bundle, tmp_path / "b.zip", lambda name, raw: raw + b"more" if name == "README.md" else raw)
    refused(path, "README.md")
    assert not list((tmp_path / "cache").rglob("README.md"))


def test_other_folders_and_files_are_no_bundles(tmp_path):
    refused(tmp_path, "not a bundle")
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 no zip")
    refused(tmp_path / "b.zip", "neither a folder nor a zip file")
    refused(tmp_path / "nothing", "no such file")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", b"")
    assert not is_bundle(tmp_path / "photos.zip")
    assert not is_bundle(tmp_path)


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_writing_is_all_or_nothing(bundle, tmp_path, name):
    out = tmp_path / name
    with pytest.raises(RuntimeError), staged(out) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []
    with staged(out) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
    Bundle.open(out)
    with pytest.raises(UadxError, match="holds a bundle"), staged(out):
        pass
    with pytest.raises(RuntimeError), staged(out, overwrite=True):
        raise RuntimeError("power cut")
    Bundle.open(out)
    with staged(out, overwrite=True) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
    Bundle.open(out)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == [name]


def test_a_replacement_that_fails_leaves_the_old_bundle(bundle, tmp_path, monkeypatch):
    out, replace = Path(shutil.copytree(bundle, tmp_path / "out")), Path.replace

    def failing(self, target):
        if Path(target) == out and self.name == "bundle":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="No space left"), staged(out, overwrite=True) as folder:
        (folder / "new.txt").touch()
    assert Bundle.open(out).manifest == Bundle.open(bundle).manifest
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_was_killed_is_undone_or_finished_by_the_next(bundle, tmp_path):
    out, aside = tmp_path / "out", tmp_path / ".out.before"
    shutil.copytree(bundle, aside)
    with pytest.raises(UadxError, match="holds a bundle"):
        check_place(out, overwrite=False)
    Bundle.open(out)
    assert not aside.exists()
    shutil.copytree(bundle, aside)
    check_place(out, overwrite=True)
    Bundle.open(out)
    assert not aside.exists()


def test_a_folder_that_is_named_like_a_zip_is_refused(tmp_path):
    (tmp_path / "e.zip").mkdir()
    with pytest.raises(UsageError, match=r"e\.zip: is a folder"), staged(tmp_path / "e.zip"):
        pass


def test_what_is_no_bundle_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UadxError, match="exists and is not a bundle"), staged(tmp_path / "photos", overwrite=True):
        pass
    with pytest.raises(UsageError, match="is a file"), staged(tmp_path / "photos" / "a.jpg", overwrite=True):
        pass
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_the_same_bundle_gives_the_same_zip(bundle, tmp_path):
    for name in ("a.zip", "b.zip"):
        with staged(tmp_path / name) as folder:
            shutil.copytree(bundle, folder, dirs_exist_ok=True)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_the_schema_in_the_documents_is_current_and_holds(bundle):
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "bundle_schema.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    schema = json.loads((ROOT / "docs" / "bundle.schema.json").read_text())
    content = json.loads((bundle / MANIFEST).read_text())
    assert set(schema["required"]) <= set(content)
    assert set(content) <= set(schema["properties"])
    assert all(
        "description" in about or "$ref" in about or name in {"schema", "precision"}
        for name, about in schema["properties"].items()
    )
