"""The folder watcher: nothing lost, nothing twice, whatever happens to its folder."""

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from watching import picture, rows_of, until

from uad_plugins.detector import open_detector
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.evaluation import watch
from uad_plugins.evaluation.watch import RESULTS, Watch


class Running:
    """A watcher in a thread, with short times."""

    def __init__(self, bundle, folder, out, **settings):
        folder.mkdir(parents=True, exist_ok=True)
        self.watch = Watch(folder, out, **{"interval": 0.05, "patience": 0.6, **settings})
        self.rows, self.said = [], []
        self.watch.tell = self.said.append
        self.thread = threading.Thread(target=self._run, args=(bundle,))

    def _run(self, bundle):
        with open_detector(bundle) as detector:
            for row in self.watch.run(detector):
                self.rows.append(row)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.watch.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


def test_a_half_written_image_is_waited_for(bundle, tmp_path):
    whole = picture(tmp_path / "whole.png", side=200).read_bytes()
    path = tmp_path / "in" / "slow.png"
    with Running(bundle, tmp_path / "in", tmp_path / "out", patience=30.0) as running:
        for end in range(0, len(whole), len(whole) // 5 + 1):
            with path.open("ab") as file:
                file.write(whole[end : end + len(whole) // 5 + 1])
            time.sleep(0.3)
        until(lambda: running.rows)
    (row,) = running.rows
    assert row["error"] is None
    assert row["bytes"] == len(whole)


def test_a_bad_image_gets_an_error_once_it_is_left_alone(bundle, tmp_path):
    whole = picture(tmp_path / "whole.png").read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.png").write_bytes(whole[:500])
    (folder / "empty.png").touch()
    picture(folder / "good.png")
    with Running(bundle, folder, tmp_path / "out") as running:
        until(lambda: len(running.rows) == 3)
        assert running.rows[0]["path"].endswith("good.png"), "bad images hold no good ones up"
        # Sent again, whole this time: another image under the same name.
        (folder / "bad.png").write_bytes(whole)
        until(lambda: len(running.rows) == 4)
    errors = {Path(row["path"]).name: row["error"] for row in rows_of(tmp_path / "out")[:3]}
    assert errors["good.png"] is None
    assert errors["empty.png"] == "empty file"
    assert "truncated" in errors["bad.png"]
    assert running.rows[3]["path"].endswith("bad.png")
    assert running.rows[3]["error"] is None


def test_images_that_vanish_and_a_share_that_goes_away_are_survived(bundle, tmp_path):
    folder = tmp_path / "in"
    picture(folder / "a.png")
    with Running(bundle, folder, tmp_path / "out") as running:
        until(lambda: len(running.rows) == 1)
        folder.rename(tmp_path / "away")
        until(lambda: running.said)
        (tmp_path / "away").rename(folder)
        picture(folder / "b.png", 1)
        until(lambda: len(running.rows) == 2)
        (folder / "a.png").unlink()
        picture(folder / "c.png", 2)
        until(lambda: len(running.rows) == 3)
    assert "cannot be read now" in running.said[0]
    assert [Path(row["path"]).name for row in running.rows] == ["a.png", "b.png", "c.png"]


def test_an_empty_mount_point_is_no_news(bundle, tmp_path):
    """A share that is not mounted leaves an empty folder: what was scored before comes back with it."""
    folder, away = tmp_path / "in", tmp_path / "away"
    picture(folder / "a.png")
    with Running(bundle, folder, tmp_path / "out") as running:
        until(lambda: len(running.rows) == 1)
        (folder / "a.png").rename(away)
        time.sleep(0.3)
        away.rename(folder / "a.png")
        time.sleep(0.3)
        picture(folder / "b.png", 1)
        until(lambda: len(running.rows) >= 2)
    assert [Path(row["path"]).name for row in running.rows] == ["a.png", "b.png"]


def test_what_is_gone_for_long_is_forgotten(bundle, tmp_path):
    folder = tmp_path / "in"
    for number in range(2):
        picture(folder / f"{number}.png", number)
    with Running(bundle, folder, tmp_path / "out", memory=0.2) as running:
        until(lambda: len(running.rows) == 2)
        kept = (folder / "0.png").rename(tmp_path / "kept.png")
        for number in (2, 3):
            time.sleep(0.3)
            picture(folder / f"{number}.png", number)
            until(lambda wanted=number: len(running.rows) == wanted + 1)
        kept.rename(folder / "0.png")
        until(lambda: len(running.rows) == 5)
    assert Path(running.rows[4]["path"]).name == "0.png"


def test_an_empty_look_neither_forgets_nor_starts_anew(monkeypatch):
    """An inbox that is emptied again and again is forgotten too; a share that is away for long is not, whatever it shows."""
    now, here = [0.0], (1, 1)
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    done = watch._Done({"a": here, "b": here})

    def look(at, *there):
        now[0] = at
        watch._forget(dict.fromkeys(there, here), {}, done, memory=10.0)
        return sorted(done.stamps)

    assert look(0, "a", "b") == ["a", "b"]
    assert look(1) == look(30) == ["a", "b"]
    # Back in part: what is missing counts from now on.
    assert look(31, "b") == look(40, "b") == ["a", "b"]
    assert look(40.5) == look(45) == ["a", "b"]
    assert look(46, "b") == ["b"]
    for number in range(100):
        done.stamps[str(number)] = here
        look(now[0] + 1, str(number))
        look(now[0] + 1)
    assert sorted(done.stamps) == [str(number) for number in range(94, 100)]


def test_a_link_that_leads_to_itself_hides_nothing(bundle, tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "loop").symlink_to("loop")
    with Running(bundle, tmp_path / "in", tmp_path / "out") as running:
        until(lambda: running.rows or running.said)
    assert running.said == []


def test_a_folder_that_cannot_be_read_hides_no_other(bundle, tmp_path, monkeypatch):
    folder, listed = tmp_path / "in", os.scandir
    picture(folder / "closed" / "a.png")
    picture(folder / "open" / "b.png")

    def refusing(place):
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with Running(bundle, folder, tmp_path / "out") as running:
        until(lambda: running.rows)
        time.sleep(0.3)
    assert Path(running.rows[0]["path"]).name == "b.png"
    assert running.said == [f"{folder.resolve() / 'closed'}: left out, it cannot be read (Permission denied)"]


def test_its_own_maps_are_not_scored_whatever_leads_to_them(bundle, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    picture(folder / "a.png")
    (folder / "link").symlink_to(out)
    (folder / "loop").symlink_to(folder)
    with Running(bundle, folder, out) as running:
        until(lambda: running.rows)
        time.sleep(0.5)
    assert len(running.rows) == 1
    assert len(list((out / "maps").rglob("*.png"))) == 1


def test_another_spelling_of_the_folder_scores_nothing_again(bundle, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    picture(folder / "a.png")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    spellings = [folder, Path("in"), folder / ".." / "in", tmp_path / "link"]
    for number, spelling in enumerate(spellings):
        with Running(bundle, spelling, out) as running:
            picture(folder / f"{number}.png", number)
            until(lambda: running.rows)
            time.sleep(0.2)
    assert sorted(Path(row["path"]).name for row in rows_of(out)) == ["0.png", "1.png", "2.png", "3.png", "a.png"]


def test_a_name_too_long_for_its_map_holds_nothing_up(bundle, tmp_path):
    folder = tmp_path / "in"
    picture(folder / f"{'n' * 249}.png")
    picture(folder / f"{'m' * 236}.png")
    picture(folder / "a.png", 1)
    with Running(bundle, folder, tmp_path / "out") as running:
        until(lambda: len(running.rows) == 3)
    errors = {Path(row["path"]).name[0]: row["error"] for row in running.rows}
    assert errors == {"a": None, "m": None, "n": "its heat map cannot be written: File name too long"}
    (row,) = [row for row in running.rows if row["error"]]
    assert (row["verdict"], row["map"]) == ("error", None)
    assert row["score"] > 0


def test_the_two_looks_are_an_interval_apart_for_each_image(bundle, tmp_path):
    """One that appears while others are scored must not be taken for whole at the look right after them."""

    class Arriving(threading.Event):
        at = None

        def wait(self, timeout=None):
            if self.at is None:
                super().wait(timeout / 2)
                picture(tmp_path / "in" / "late.png", 1)
                Arriving.at = time.monotonic()
            return super().wait(timeout / 2)

    picture(tmp_path / "in" / "first.png")
    stop = Arriving()
    with open_detector(bundle) as detector:
        for row in Watch(tmp_path / "in", tmp_path / "out", stop=stop, interval=1.0).run(detector):
            if Path(row["path"]).name == "late.png":
                waited = time.monotonic() - stop.at
                stop.set()
    assert waited >= 1.0


def test_the_batch_size_reaches_the_detector(bundle, tmp_path):
    picture(tmp_path / "in" / "a.png")
    with open_detector(bundle) as detector:
        sizes, stream = [], detector.stream
        detector.stream = lambda paths, **settings: sizes.append(settings["batch_size"]) or stream(paths, **settings)
        watch = Watch(tmp_path / "in", tmp_path / "out", interval=0.05, batch_size=3)
        next(watch.run(detector))
    assert sizes == [3]


def test_names_that_differ_in_their_ending_have_maps_of_their_own(bundle, tmp_path):
    for name in ("a.png", "a.jpg", "b/a.png"):
        picture(tmp_path / "in" / name)
    with Running(bundle, tmp_path / "in", tmp_path / "out") as running:
        until(lambda: len(running.rows) == 3)
    assert len({row["map"] for row in running.rows}) == 3
    assert all(Path(row["map"]).is_relative_to(tmp_path / "out") for row in running.rows)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_watchers_of_one_result_are_refused(bundle, tmp_path):
    picture(tmp_path / "in" / "a.png")
    with Running(bundle, tmp_path / "in", tmp_path / "out") as running, open_detector(bundle) as detector:
        until(lambda: running.rows)
        with pytest.raises(UadxError, match="another watcher is writing to it"):
            next(Watch(tmp_path / "in", tmp_path / "out").run(detector))


def test_what_cannot_be_watched_is_refused(bundle, tmp_path):
    picture(tmp_path / "in" / "a.png")
    with open_detector(bundle) as detector:
        (tmp_path / "link").symlink_to(tmp_path / "in")
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "maps").symlink_to(tmp_path / "in")
        roundabout = tmp_path / "in" / "sub" / ".."
        for out in ("in", "in/results", "link", "link/results", "in/../in/results", "results"):
            for folder in (tmp_path / "in", tmp_path / "link", roundabout):
                (tmp_path / "in" / "sub").mkdir(exist_ok=True)
                with pytest.raises(UsageError, match="lies in the folder that is watched"):
                    next(Watch(folder, tmp_path / out).run(detector))
        picture(tmp_path / "out" / "maps" / "new" / "a.png")
        with pytest.raises(UsageError, match="lies in the folder of the heat maps"):
            next(Watch(tmp_path / "out" / "maps" / "new", tmp_path / "out").run(detector))
        with pytest.raises(UadxError, match="no such folder"):
            next(Watch(tmp_path / "nowhere", tmp_path / "out").run(detector))
        with pytest.raises(UsageError, match="unknown category"):
            next(Watch(tmp_path / "in", tmp_path / "out", "washr").run(detector))
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / RESULTS).write_text("a line of something else\n")
        with pytest.raises(UadxError, match="is not a watcher's file"):
            next(Watch(tmp_path / "in", tmp_path / "out").run(detector))
    assert (tmp_path / "out" / RESULTS).read_text() == "a line of something else\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
def test_a_full_disk_ends_it_with_one_line(bundle, tmp_path, monkeypatch):
    picture(tmp_path / "in" / "a.png")
    real = os.fsync

    def full(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().name == RESULTS:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with open_detector(bundle) as detector, pytest.raises(UadxError, match="No space left on device"):
        next(Watch(tmp_path / "in", tmp_path / "out", interval=0.05).run(detector))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_every_row_is_on_the_disk_before_it_is_told(bundle, tmp_path, monkeypatch):
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", number)
    synced, real = [], os.fsync

    def noting(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().name == RESULTS:
            synced.append(len(rows_of(tmp_path / "out")))
        real(handle)

    monkeypatch.setattr(os, "fsync", noting)
    with open_detector(bundle) as detector:
        watch = Watch(tmp_path / "in", tmp_path / "out", interval=0.05)
        for count, _ in enumerate(watch.run(detector), start=1):
            assert synced == list(range(1, count + 1))
            if count == 4:
                watch.stop.set()


def test_the_names_of_the_results_are_no_news(bundle, tmp_path):
    """A file name that is no text survives the way through JSON."""
    folder = tmp_path / "in"
    source = picture(tmp_path / "a.png")
    folder.mkdir()
    try:
        shutil.copy(source, os.fsencode(folder) + b"/\xff\xfe.png")
    except OSError:
        pytest.skip("this file system takes text alone")
    with Running(bundle, folder, tmp_path / "out") as running:
        until(lambda: running.rows)
    with Running(bundle, folder, tmp_path / "out") as again:
        picture(folder / "b.png")
        until(lambda: again.rows)
    assert [Path(row["path"]).name for row in again.rows] == ["b.png"]
