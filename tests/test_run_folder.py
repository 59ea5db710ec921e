"""Where a run is written: folders that cannot be, and links to folders."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from runs import small_run

from uad_plugins.artifacts import Run
from uad_plugins.errors import UadxError
from uad_plugins.training import run_folder
from uad_plugins.training.run_folder import discard, locked, own_place


def test_a_folder_beside_which_nothing_can_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    """As that of a volume, whose parent belongs to the system."""
    out = tmp_path / "volume"
    out.mkdir()

    def refused(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched, pytest.raises(UadxError) as error:
        patched.setattr(Path, "open", refused)
        with locked(out):
            pass
    assert error.value.message == f"{tmp_path}: cannot be written to: Permission denied"
    assert error.value.hint.endswith(f"such as {out}/run")


@pytest.mark.parametrize(
    ("place", "message"), [("file/run", "file: cannot be written to: File exists"), ("file/deep/run", "Not a directory")]
)
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path, place, message):
    (tmp_path / "file").touch()
    with pytest.raises(UadxError, match=message) as error, locked(tmp_path / place):
        pass
    assert error.value.hint == "a file is where a folder is needed: name another place"


def test_a_link_is_followed_and_stays(products, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "latest").symlink_to("run")
    small_run(products, tmp_path / "latest", {"trainer": {"max_epochs": 1}}, overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert Run.open(run).config().trainer["max_epochs"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "run"]
    with locked(run), pytest.raises(UadxError, match="another process is writing to it"):
        small_run(products, tmp_path / "latest")


def test_a_link_to_nowhere_yet_is_followed(tmp_path):
    (tmp_path / "latest").symlink_to("run")
    assert own_place(tmp_path / "latest") == tmp_path / "run"


def test_what_a_killed_replacement_left_behind_is_cleared_away(tmp_path, monkeypatch):
    for name in ("run", "run[1]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            discard(tmp_path / name)
        assert list(tmp_path.glob(".*.replaced.*"))
        (tmp_path / ".run2.replaced.x").mkdir(exist_ok=True)
        discard(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [".run2.replaced.x"]


def test_a_lock_that_its_holder_has_deleted_meanwhile_is_none(tmp_path, monkeypatch):
    """The holder deletes the file when it is done: whoever has opened that one must not think that it has the lock."""
    flock = run_folder.fcntl.flock

    def late(file, operation):
        (tmp_path / ".run.lock").unlink()
        (tmp_path / ".run.lock").touch()
        flock(file, operation)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with pytest.raises(UadxError, match="another process is writing to it"), locked(tmp_path / "run"):
        pytest.fail("the lock was given")


def test_a_folder_that_cannot_be_moved_leaves_nothing_behind(tmp_path, monkeypatch):
    """As one that is mounted."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()

    def busy(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UadxError, match="run: cannot be replaced: Device or resource busy"):
        discard(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
