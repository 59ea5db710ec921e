"""The example plugin is installed and used as a stranger would, and the page on plugins says what is so."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from PIL import Image

from uad_plugins import hookspecs

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "example-plugin"
PAGE = ROOT / "docs" / "plugins.md"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the example, so that nothing is left behind in the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
    return shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "example-plugin", ignore=ignored)


@pytest.fixture(scope="module")
def site(source, tmp_path_factory):
    """A folder that the example is installed to, without a network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def data(tmp_path):
    days = ("bolt/2026-01-05/ok/1", "bolt/2026-01-05/ok/2", "bolt/2026-01-05/ok/3", "bolt/2026-01-06/ok/1")
    nuts = ("nut/2026-01-05/ok/1", "nut/2026-01-05/ok/2", "nut/2026-01-07/ok/1")
    for number, name in enumerate([*days, "bolt/2026-01-06/nok/1", *nuts]):
        path = tmp_path / "dated data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (number, 0, 0)).save(path)
    return tmp_path / "dated data"


def python(site, *words, cwd=None, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UADX_", "PYTEST_", "COV_"))}
    environment = {**clean, "PYTHONPATH": str(site), "COLUMNS": "80", **variables}
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd)


def uadx(site, *words, **variables):
    return python(site, "-m", "uadx", *words, **variables)


def example_entries(done):
    assert (done.returncode, done.stderr) == (0, "")
    return [entry for entry in json.loads(done.stdout)["plugins"] if entry["distribution"] != "uadx"]


def test_it_is_listed_with_its_distribution_and_version(site):
    entries = example_entries(uadx(site, "plugins", "list", "--json", UADX_STRICT_PLUGINS="1"))
    common = {"distribution": "uadx-example-plugin", "version": "1.0.0", "status": "ok"}
    assert entries == [
        {"kind": "command", "name": "count", **common, "summary": "Count the images of each category."},
        {
            "kind": "layout",
            "name": "dated",
            **common,
            "summary": "CATEGORY/YYYY-MM-DD/{ok,nok}: earlier days train, the last one tests",
        },
    ]


def test_its_command_runs_and_is_shown_in_help(site, data):
    done = uadx(site, "count", data)
    assert (done.returncode, done.stdout, done.stderr) == (0, "bolt\t5\nnut\t3\n", "")
    assert "count       Count the images of each category." in uadx(site, "--help").stdout
    wrong = uadx(site, "count", data / "nowhere")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith(f"error: {data / 'nowhere'}: no such file or folder\n")


@pytest.mark.parametrize("options", [["--layout", "dated"], []])
def test_its_layout_is_used_and_recognised(site, data, options):
    done = uadx(site, "data", "check", data, "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)["categories"]
    counts = {name: (found["train"], found["test_normal"], found["test_anomalous"]) for name, found in report.items()}
    assert counts == {"bolt": (3, 1, 1), "nut": (2, 1, 0)}


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("", []),
        ("something_else_that_is_not_there", ["something_else_that_is_not_there"]),
        ("example", ["count", "dated"]),
        ("uadx-example-plugin", ["count", "dated"]),
        ("uadx_example_plugin", ["count", "dated"]),
    ],
)
def test_the_environment_narrows_what_is_loaded(site, selection, names):
    done = uadx(site, "plugins", "list", "--json", UADX_LOAD_PLUGINS=selection)
    assert done.returncode == 0
    listed = [entry for entry in json.loads(done.stdout)["plugins"] if entry["distribution"] != "uadx"]
    assert [entry["name"] for entry in listed] == names


def test_a_command_of_a_plugin_that_is_not_loaded_does_not_exist(site, data):
    done = uadx(site, "count", data, UADX_LOAD_PLUGINS="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'count'" in done.stderr


def test_its_own_conformance_tests_pass(site, source, tmp_path):
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "pytest"]
    # From the folder of the tests: it is the installed module that they import, not the one beside them.
    done = python(site, "-m", "pytest", *options, cwd=source / "tests", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 10
    assert "skipped" not in done.stdout


def test_the_kit_for_layouts_and_engines_needs_no_torch(site):
    code = (
        "import sys, uad_plugins.testing as kit; kit.LayoutConformance, kit.RuntimeConformance; "
        "print(sorted({'torch', 'anomalib', 'lightning', 'timm'} & set(sys.modules)))"
    )
    done = python(site, "-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_pytest_is_imported_nowhere_but_in_the_kit():
    packages = [*(ROOT / "uad_plugins").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    importing = {path.parent.name for path in packages if re.search(r"^\s*(import|from) pytest", path.read_text(), re.M)}
    assert importing == {"testing"}


def section(heading):
    text = PAGE.read_text()
    found = re.search(rf"^### `{re.escape(heading)}`\n(.*?)(?=^##)", text, re.M | re.S)
    assert found, f"docs/plugins.md has no section for {heading}"
    return found[1]


def signature(hook):
    return f"{hook}() -> {inspect.signature(getattr(hookspecs, hook)).return_annotation}"


def rows(cls):
    """The table of a dataclass: field and type, with the default."""
    for item in fields(cls):
        value = item.default.__name__ if isinstance(item.default, type) else repr(item.default)
        default = {MISSING: ""}.get(item.default, f" = {value}")
        yield item.name, f"{item.type}{default}".replace("|", "\\|")


@pytest.mark.parametrize("kind", hookspecs.KINDS)
def test_every_hook_is_documented_with_its_signature_and_fields(kind):
    hook, cls = hookspecs.KINDS[kind]
    text = section(signature(hook))
    assert re.findall(r"^\| `(\w+)` \| `(.+?)` \| \S", text, re.M) == list(rows(cls))


def test_requirements_are_documented():
    assert re.findall(r"^\| `(\w+)` \| `(.+?)` \| \S", section("Requirement"), re.M) == list(rows(hookspecs.Requirement))


def test_every_hook_is_one_of_the_kinds():
    hooks = {name for name, value in vars(hookspecs).items() if hasattr(value, "uadx_spec")}
    assert hooks == {hook for hook, _ in hookspecs.KINDS.values()}


def test_the_worked_example_is_the_example_plugin():
    quoted = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    assert quoted == {name: (EXAMPLE / name).read_text() for name in quoted}
    ours = {path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*.py")}
    assert set(quoted) == {*ours, "pyproject.toml"}


def test_the_variables_and_classes_are_named():
    from uad_plugins import registry, testing

    text = PAGE.read_text()
    for name in (registry.LOAD_VARIABLE, registry.STRICT_VARIABLE, *testing.__all__[1:]):
        assert f"`{name}" in text, name
