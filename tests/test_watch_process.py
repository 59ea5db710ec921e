"""The folder watcher as a process of its own: stopped, killed, started again."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watching import picture, rows_of, until

from uad_plugins.detector import open_detector
from uad_plugins.evaluation.watch import RESULTS


@contextlib.contextmanager
def watcher(bundle, folder, out, *words):
    """Run the command until the block ends; yields the process."""
    command = [sys.executable, "-m", "uadx", "predict", str(bundle), "--watch", str(folder), "--out", str(out), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_images_are_scored_as_they_arrive_and_a_restart_does_none_twice(bundle, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        picture(folder / f"{number}.png", number)
    with watcher(bundle, folder, out, "--category", "washer", "--json") as process:
        until(lambda: len(rows_of(out)) == 3)
        picture(folder / "shift2" / "late.png", 9)
        (folder / "notes.txt").write_text("no image")
        until(lambda: len(rows_of(out)) == 4)
        process.send_signal(signal.SIGTERM)
        printed, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
    assert "stopped after 4 images" in said
    assert [json.loads(line) for line in printed.splitlines()] == rows_of(out)
    rows = rows_of(out)
    assert {Path(row["path"]).name for row in rows} == {"0.png", "1.png", "2.png", "late.png"}
    assert all(row["error"] is None and Path(row["map"]).exists() and row["category"] == "washer" for row in rows)
    with open_detector(bundle) as detector:
        wanted = {item.path: item.score for item in detector.stream([row["path"] for row in rows])}
    assert all(row["score"] == pytest.approx(wanted[row["path"]]) for row in rows)

    picture(folder / "3.png", 3)
    with watcher(bundle, folder, out) as process:
        until(lambda: len(rows_of(out)) == 5)
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopped after 1 images" in said
    assert rows_of(out)[:4] == rows
    assert Path(rows_of(out)[4]["path"]).name == "3.png"


def test_a_killed_watcher_loses_nothing(bundle, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(30):
        picture(folder / f"{number:02d}.png", number)
    with watcher(bundle, folder, out) as process:
        until(lambda: len(rows_of(out)) >= 3)
        process.kill()
        process.wait()
    before = len((out / RESULTS).read_bytes().splitlines())
    # As after a power cut: the last line is there in part.
    with (out / RESULTS).open("ab") as file:
        file.write(b'{"path": "' + str(folder).encode())
    with watcher(bundle, folder, out) as process:
        until(lambda: len([1 for line in (out / RESULTS).read_bytes().splitlines() if line.endswith(b"}")]) == 30)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert f"stopped after {30 - before} images" in said
    assert sorted(Path(row["path"]).name for row in rows_of(out)) == [f"{number:02d}.png" for number in range(30)]
