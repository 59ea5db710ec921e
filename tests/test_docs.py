"""The documentation says what the program does."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from uad_plugins.config import TrainConfig, keys
from uad_plugins.registry import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_the_page_of_commands_is_what_the_program_says():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_configuration_has_every_key():
    table = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE))
    assert table >= set(keys(TrainConfig))
    assert len({plugin.options for plugin in registry().items("model")}) > 3
    for plugin in registry().items("model"):
        assert table >= {f"model.options.{key}" for key in keys(plugin.options)}, plugin.name
    for kind in "quantizer", "target":
        for plugin in registry().items(kind):
            assert table >= set(keys(plugin.options)), plugin.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_complete(page):
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table.splitlines()[cells.index(min(cells))]
    assert not re.search(r"\b(TODO|TBD)\b", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documents_exist_with_their_options(page):
    helped = (ROOT / "docs" / "commands.md").read_text()
    for line in re.findall(r"^\s*(uadx [a-z][^#\n`]*)", page.read_text(), re.MULTILINE):
        if page.name == "commands.md":
            continue
        words = line.split()
        name = " ".join(words[:3]) if words[1] in {"data", "plugins", "teacher"} else " ".join(words[:2])
        section = helped.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert section or name == "uadx count", name
        for option in (word for word in words if word.startswith("--")):
            assert f"{option.partition('=')[0]} " in section or name == "uadx count", (name, option)


def test_the_architecture_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path for path in (ROOT / "uad_plugins").iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert rooms
    for room in rooms:
        assert f"uad_plugins/{room.name}/" in page, room.name


def test_no_file_is_longer_than_a_room_may_be():
    sources = [*(ROOT / "uad_plugins").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    assert [path.name for path in sources if len(path.read_text().splitlines()) > 400] == []


def test_a_wheel_would_hold_the_two_packages_and_the_recipes_alone():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'packages = ["cli/uadx", "uad_plugins"]' in project
    assert '"configs" = "uad_plugins/configs"' in project
    assert all(yaml.safe_load(path.read_text()) for path in (ROOT / "configs").glob("*.yaml"))


def test_the_extras_are_what_they_are_said_to_be():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements):
        return {re.split(r"[^\w-]", requirement, maxsplit=1)[0] for requirement in requirements}

    heavy = {"torch", "torchvision", "anomalib", "lightning", "timm", "openvino", "nncf", "onnx", "onnxruntime", "tensorrt"}
    assert not names(project["dependencies"]) & heavy
    assert names(extras["train"]) >= {"anomalib", "torch", "torchvision", "lightning", "timm"}
    assert names(extras["openvino"]) == {"openvino", "nncf", "torchao"}
    assert names(extras["onnx"]) == {"onnx", "onnxruntime"}
    assert names(extras["tensorrt"]) == {"tensorrt", "pycuda"}
    assert extras["all"] == ["uadx[train,openvino,onnx]"]
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+( *;.*)?", line) for line in pinned)
    lower = {name.lower() for name in names(pinned)}
    wanted = {name for extra in ("train", "openvino", "onnx") for name in names(extras[extra])} | names(
        project["dependencies"]
    )
    assert {name.lower() for name in wanted} <= lower


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_the_recipes_alone(tmp_path):
    import zipfile

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"uadx", "uad_plugins"}
    assert "uad_plugins/configs/stfpm.yaml" in names
    assert {"resnet18_layer3.safetensors", "teacher_33_50.safetensors"} <= {Path(name).name for name in names}
