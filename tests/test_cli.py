"""The command line: what it prints where, how it exits, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from uadx import __version__
from uadx.app import main
from uadx.output import program

from uad_plugins.errors import UadxError


def isolated(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["plugins", "list"], ["evaluate", "-h"], ["--version"]])
def test_nothing_heavy_is_loaded_to_show_help(words):
    heavy = ("torch", "anomalib", "lightning", "timm", "torchvision", "openvino", "pandas", "scipy")
    done = isolated(
        f"import sys\nfrom uadx.app import main\ntry:\n    main({words!r})\nexcept SystemExit as stop:\n"
        f"    assert not stop.code, stop.code\nprint('LOADED', sorted(set({heavy!r}) & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stderr


def test_help_lists_every_command(uadx):
    status, out, _ = uadx("--help")
    assert status == 0
    commands = [line.split()[0] for line in out[out.index("Commands:") :].splitlines()[1:] if line.startswith("  ")]
    assert set(commands) >= {
        "quickstart",
        "train",
        "evaluate",
        "predict",
        "thresholds",
        "doctor",
        "data",
        "plugins",
        "deploy",
        "quantize",
    }


def test_version(uadx):
    assert uadx("--version") == (0, f"uadx {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["train", "DATA"], 2, "error: no folder to write the run to\nhint: add --out RUN\n"),
        (
            ["train", "DATA", "--out", "OUT", "--model", "stpm"],
            2,
            "error: unknown model 'stpm'\nhint: did you mean 'stfpm'?",
        ),
        (["train", "DATA", "--out", "OUT", "--set", "optimizer.lrr=1"], 2, "hint: did you mean 'optimizer.lr'?\n"),
        (["train", "DATA", "--out", "OUT", "--set", "lr"], 2, "error: 'lr' is not KEY=VALUE\n"),
        (["train", "DATA", "--out", "OUT", "--resume", "--overwrite"], 2, "contradict each other"),
        (["train", "NOWHERE", "--out", "OUT", "--weights", "bundled"], 1, "no such file or folder\n"),
        (["train", "DATA", "--out", "OUT", "--config", "nope.yaml"], 1, "nope.yaml: no such configuration file"),
        (["train", "DATA", "--out", "OUT", "--weights", "w.pth"], 1, "w.pth: no such file or folder of backbone weights"),
        (["train", "DATA", "--out", "OUT", "--model", "anomalib:Padimm"], 2, "did you mean 'Padim'?"),
        (["evaluate", "NOWHERE", "DATA"], 1, "no such file or folder"),
        (["evaluate", "DATA", "DATA"], 1, "not a run, a quantized model or a bundle"),
        (["evaluate", "RUN", "NOWHERE"], 1, "no such file or folder"),
        (["evaluate", "RUN", "DATA", "--engine", "torhc"], 2, "did you mean 'torch'?"),
        (["predict", "RUN", "DATA", "--category", "washr"], 2, "did you mean 'washer'?"),
        (["predict", "RUN"], 2, "error: no image to predict\n"),
        (["predict", "RUN", "--watch", "DATA"], 2, "error: no folder to write the results to\nhint: add --out DIR\n"),
        (["predict", "RUN", "DATA", "--watch", "DATA", "--out", "OUT"], 2, "--watch takes the place of PATH"),
        (["deploy", "RUN"], 2, "error: no place to write the bundle to\nhint: add --out BUNDLE\n"),
        (["deploy", "RUN", "--out", "OUT", "--target", "openvino"], 2, "did you mean 'openvino-cpu'?"),
        (["deploy", "RUN", "--out", "OUT", "--precision", "int8"], 2, "for int8 quantize first: uadx quantize"),
        (["deploy", "DATA", "--out", "OUT"], 1, "neither a run nor a quantized model"),
        (["deploy", "RUN", "--out", "DATA"], 1, "exists and is not a bundle"),
        (["data", "check", "NOWHERE"], 1, "no such file or folder"),
        (["data", "check", "DATA", "--layout", "vissa"], 2, "did you mean 'visa'?"),
        (["data", "synth", "DATA"], 1, "exists and is not an empty folder"),
        (["data", "synth", "OUT", "--product", "washr"], 2, "did you mean 'washer'?"),
        (["thresholds", "RUN", "DATA", "--method", "best-f1", "--target-fpr", "0.1"], 2, "best-f1 aims at no rate"),
        (["train", "DATA", "--out", "OUT", "--config", "stfpm_shrt"], 1, "did you mean 'stfpm_short'?"),
        (["thresholds", "RUN", "DATA", "--method", "guess"], 2, "unknown threshold method 'guess'"),
    ],
)
def test_wrong_use_is_one_line_and_a_way_out(uadx, products, trained, tmp_path, words, status, message):
    places = {"DATA": products, "RUN": trained, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    found, out, err = uadx(*(places.get(word, word) for word in words))
    assert found == status, err
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2


def test_an_unknown_option_is_refused_before_anything_is_touched(uadx, tmp_path):
    status, out, err = uadx("train", tmp_path, "--out", tmp_path / "o", "--epoch", "3")
    assert (status, out) == (2, "")
    assert "--epochs" in err
    assert not (tmp_path / "o").exists()


def test_debug_shows_where(tmp_path):
    with pytest.raises(UadxError, match="no such file or folder"):
        main(["data", "check", str(tmp_path / "nowhere"), "--debug"])


def test_a_recipe_of_another_method_is_noted(uadx, products, tmp_path):
    words = ("--model", "stfpm", "--config", "reverse_distillation", "--weights", "bundled", "--out", tmp_path / "run")
    status, _, err = uadx("train", products, *words)
    # Its backbone is that of the recipe.
    assert status == 1
    assert "reverse_distillation.yaml is made for reverse_distillation; its settings are used for stfpm\n" in err
    assert "the bundled weights are of resnet18, not wide_resnet50_2\nhint: --backbone resnet18, " in err


def test_train_prints_one_json_document(uadx, products, tmp_path):
    words = ["train", products, "--model", "stfpm", "--weights", "bundled", "--image-size", "64", "--epochs", "1"]
    words += ["--out", tmp_path / "run", "--json", "--set", "data.num_workers=0", "data.train_batch_size=8"]
    status, out, err = uadx(*words)
    assert status == 0, err
    document = json.loads(out)
    assert document["run"] == str(tmp_path / "run")
    assert (document["epochs"], document["samples_seen"]) == (1, 27)


@pytest.mark.slow
def test_the_methods_train_and_are_measured(uadx, products, tmp_path):
    for model in ("reverse_distillation", "anomalib:Padim"):
        run = tmp_path / model.replace(":", "_")
        words = ["train", products, "--model", model, "--backbone", "resnet18", "--weights", "bundled", "--epochs", "1"]
        status, _, err = uadx(*words, "--image-size", "64", "--batch-size", "8", "--out", run)
        assert status == 0, err
        status, out, err = uadx("evaluate", run, products, "--json")
        assert status == 0, err
        report = json.loads(out)
        assert sorted(report["categories"]) == ["connector", "fabric", "washer"]
        assert all(0 <= value <= 1 for value in report["mean"].values())


def test_data_check_finds_problems_and_says_so_with_its_exit_status(uadx, products, tmp_path):
    status, out, _ = uadx("data", "check", products, "--json")
    assert status == 0
    assert json.loads(out)["trainable"] is True
    data = shutil.copytree(products, tmp_path / "data")
    sorted((data / "fabric" / "train" / "good").iterdir())[0].write_bytes(b"x")
    status, out, err = uadx("data", "check", data)
    assert status == 1
    assert "error: fabric/train/good/0000.png: not an image of a known format" in out
    assert "--skip-bad" in err


def test_data_synth(uadx, tmp_path):
    status, out, _ = uadx(
        "data", "synth", tmp_path / "d", "--size", "32", "--train", "2", "--test", "1", "--product", "fabric"
    )
    assert (status, out) == (0, f"{tmp_path / 'd'}\n")
    assert sum(1 for _ in (tmp_path / "d").rglob("*.png")) == 5


def test_a_run_without_torch_names_what_it_needs(uadx, trained, products, monkeypatch):
    monkeypatch.delitem(sys.modules, "uad_plugins.models.torch_detector", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, err = uadx("predict", trained, products)
    expected = "error: a trained run needs a package that is not installed: torch\nhint: pip install 'uadx[train]'\n"
    assert (status, err) == (1, expected)


def test_blanks_in_the_name_of_a_file_stay(uadx, tmp_path):
    _, _, err = uadx("data", "check", tmp_path / "part  01")
    assert err.startswith(f"error: {tmp_path}/part  01: no such file or folder\n")


@pytest.mark.parametrize(("on_path", "called"), [(False, "{bin}/uadx"), (True, "uadx"), (None, "{bin}/uadx")])
def test_next_steps_name_the_program_as_it_is_called(tmp_path, monkeypatch, on_path, called):
    (tmp_path / "bin").mkdir()
    (tmp_path / "other").mkdir()
    for folder in ("bin", "other"):
        (tmp_path / folder / "uadx").touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "uadx"), "quickstart"])
    monkeypatch.setenv("PATH", {True: str(tmp_path / "bin"), False: "/nowhere", None: str(tmp_path / "other")}[on_path])
    assert program() == called.format(bin=tmp_path / "bin")
    monkeypatch.setattr(sys, "argv", ["/somewhere/uadx/__main__.py"])
    assert program() == f"{sys.executable} -m uadx"
    monkeypatch.setattr(sys, "executable", "/a b/python")
    assert program() == "'/a b/python' -m uadx"
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "uadx").touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "a b" / "uadx")])
    assert program() == f"'{tmp_path}/a b/uadx'"


def test_plugins_list(uadx):
    status, out, _ = uadx("plugins", "list", "--json")
    rows = json.loads(out)["plugins"]
    assert status == 0
    assert {
        "kind": "model",
        "name": "stfpm",
        "distribution": "uadx",
        "version": __version__,
        "status": "ok",
    }.items() <= next(row for row in rows if row["name"] == "stfpm").items()


def test_the_output_can_be_cut_off(products, trained):
    command = f"{sys.executable} -m uadx predict {trained} {products} | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_deploy_prints_one_json_document_and_its_bundle_predicts(uadx, trained, products, tmp_path):
    status, out, err = uadx("deploy", trained, "--out", tmp_path / "b.zip", "--json", "--no-pictures")
    assert status == 0, err
    document = json.loads(out)
    assert document["out"] == str(tmp_path / "b.zip")
    assert (document["target"], document["precision"]) == ("openvino-cpu", "fp32")
    status, out, err = uadx("deploy", trained, "--out", tmp_path / "b.zip", "--overwrite", "--precision", "fp16")
    assert status == 0, err
    assert out.splitlines()[-1].endswith("verified")
    images = products / "washer" / "test" / "good"
    status, out, err = uadx(
        "predict", tmp_path / "b.zip", images, "--category", "washer", "--out", tmp_path / "maps", "--json"
    )
    assert status == 0, err
    rows = json.loads(out)["predictions"]
    assert len(rows) == 4
    assert all((tmp_path / "maps" / row["map"]).exists() for row in rows)
    status, out, err = uadx("predict", tmp_path / "b.zip", images, "--engine", "onnxruntime")
    assert (status, out) == (1, "")
    assert "the engine 'onnxruntime' does not run it" in err


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (PermissionError(13, "Permission denied", "/x/run"), "/x/run: Permission denied", "change its permissions"),
        (PermissionError(13, "Permission denied", "/x/.run.lock"), "/x: Permission denied", "change its permissions"),
        (NotADirectoryError(20, "Not a directory", "/x/run"), "/x/run: Not a directory", "name another place"),
        (OSError(28, "No space left on device", "/x/run"), "/x/run: No space left on device", "make room"),
        (PermissionError(13, "Permission denied", "/cache/a"), "/cache/a: Permission denied", "set UADX_CACHE"),
        (OSError("who knows"), "OSError: who knows", "--debug"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_a_way_out(uadx, monkeypatch, error, message, hint):
    def refuse(*_):
        raise error

    monkeypatch.setenv("UADX_CACHE", "/cache")
    monkeypatch.setattr("uad_plugins.data.layouts.scan", refuse)
    status, out, err = uadx("data", "check", "x")
    assert (status, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == f"error: {message}"
    assert lines[1].startswith("hint: ") and hint in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_a_folder_for_results_is_made_before_anything_is_scored(uadx, trained, products, tmp_path, monkeypatch, verb):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("uad_plugins.detector.open_detector", lambda *_: pytest.fail("opened"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = uadx(verb, trained, products, "--out", out)
        assert status == 1
        assert f"error: {out}: no folder can be made: " in err
        assert "name another one with --out" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    from uadx.output import result_folder

    monkeypatch.setenv("HOME", str(tmp_path))
    assert result_folder(Path("~/results")) == tmp_path / "results"
    assert (tmp_path / "results").is_dir()


def test_what_to_run_next_can_be_copied(uadx, tmp_path):
    from uadx.output import command

    assert command("evaluate", tmp_path / "my run", "d").endswith(f" evaluate '{tmp_path}/my run' d")


def test_synthetic_products_as_json(uadx, tmp_path):
    words = ("--size", 32, "--train", 2, "--test", 1, "--product", "washer")
    status, out, _ = uadx("data", "synth", tmp_path / "s", *words, "--json")
    assert status == 0
    assert json.loads(out) == {"out": str(tmp_path / "s"), "categories": ["washer"], "train": 2, "test": 1, "size": 32}
    assert uadx("data", "synth", tmp_path / "t", "--size", 100_000)[0] == 2


def test_a_quickstart_that_is_replaced_keeps_what_others_have_put_there(tmp_path):
    from uad_plugins.quickstart import MARK, OWN, _discard

    for name in OWN:
        (tmp_path / name).touch()
    (tmp_path / "run").unlink()
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert MARK in OWN
    _discard(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
