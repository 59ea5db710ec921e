"""The Jetson runner as a program: what it measures, and how it runs where its files were copied to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from jetson_device import write_bundle

ROOT = Path(__file__).parents[1]


def test_the_benchmark_is_one_document(device, tmp_path):
    done = device.run("benchmark", "--warm-up", "3", "--images", "10", "--out", str(tmp_path / "b.json"))
    assert done.status == 0
    document = json.loads(done.out)
    assert document == json.loads((tmp_path / "b.json").read_text())
    assert (document["images"], document["gpu"], document["tensorrt"]) == (10, "Orin", device.trt.__version__)
    latency = document["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    assert document["memory_mib"]["device_used"] == 5 << 10
    assert document["memory_mib"]["process_peak"] > 10
    assert document["images_per_s"] > 0
    # The first result, the warm-up and both measurements; each image is run once and waited for once.
    ran = [lane for what, lane in device.cuda.log if what == "execute"]
    assert (len(ran), ran[14:]) == (24, [0, 1] * 5)
    assert [what for what, _ in device.cuda.log].count("synchronize") == 24 + 2


def test_the_throughput_keeps_two_images_under_way(device):
    device.run("benchmark", "--warm-up", "1", "--images", "4")
    log = [entry for entry in device.cuda.log if entry[0] in {"execute", "synchronize"}][2 * (1 + 1 + 4) :]
    run, wait = "execute", "synchronize"
    assert log[:8] == [(run, 0), (run, 1), (wait, 0), (run, 0), (wait, 1), (run, 1), (wait, 0), (wait, 1)]


def test_a_single_image_is_measured_on_the_lane_that_runs_it(device):
    done = device.run("benchmark", "--warm-up", "1", "--images", "1")
    assert json.loads(done.out)["images"] == 1
    log = [entry for entry in device.cuda.log if entry[0] in {"execute", "synchronize"}]
    # Closing waits for both lanes once more.
    assert log[-4:] == [("execute", 0), ("synchronize", 0), ("synchronize", 0), ("synchronize", 1)]


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom jetson_device import PACKAGE, Device\n"
        f"device = Device('10.3', Path({str(bundle)!r}))\nsys.stdin.read()\n"
        "with device.installed():\n"
        "    from uad_plugins.deployment.jetson.uadx_jetson.commands import main\n"
        f"    sys.exit(main(['predict', '--bundle', {str(bundle)!r}, 'missing.png']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, ROOT]))}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        complaint = process.stderr.read().decode()
    assert process.returncode == 141
    assert "Traceback" not in complaint
    assert "BrokenPipe" not in complaint


def test_the_copied_files_run_alone_and_say_what_is_missing(tmp_path):
    source = ROOT / "uad_plugins" / "deployment" / "jetson"
    bundle = write_bundle(tmp_path / "bundle")
    shutil.copy(source / "runner.py", bundle)
    shutil.copytree(source / "uadx_jetson", bundle / "uadx_jetson", ignore=shutil.ignore_patterns("__pycache__"))
    # Isolated from this installation; tensorrt is shadowed, for a machine that has it.
    (bundle / "tensorrt.py").write_text("raise ImportError('none here')")
    (bundle / "pycuda").mkdir()
    (bundle / "pycuda" / "driver.py").touch()
    done = subprocess.run([sys.executable, "runner.py", "build"], cwd=bundle, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: tensorrt and pycuda are needed on the device: none here\n"
    helped = subprocess.run([sys.executable, "runner.py", "--help"], cwd=bundle, capture_output=True, text=True)
    assert "build | predict | benchmark" in helped.stdout
