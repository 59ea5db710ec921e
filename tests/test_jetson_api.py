"""What the Jetson runner asks of TensorRT exists in each version, and what it asks of Python exists in 3.8."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tensorrt import FakeTensorRT, read_surface
from jetson_device import Device, write_bundle
from PIL import Image
from tensorrt_api import collect

FOLDER = Path(__file__).parents[1] / "uad_plugins" / "deployment" / "jetson"
SOURCES = sorted([FOLDER / "runner.py", *(FOLDER / "uadx_jetson").glob("*.py")])
VERSIONS = list(collect.PACKAGES)

GONE = {
    "11.4": {
        "BuilderFlag.FP16",
        "BuilderFlag.INT8",
        "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    },
    "8.6": {"NetworkDefinitionCreationFlag.STRONGLY_TYPED"},
}
"""What the runner names though a version has it not: only behind a question whether it is there."""


def chains(source):
    """Names below the TensorRT module, such as ``BuilderFlag.FP16``, in a source file; an alias of an enum is followed."""
    tree = ast.parse(source)
    aliases = {"trt": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (chain := dotted(node.value, aliases)) and isinstance(node.targets[0], ast.Name):
            aliases[node.targets[0].id] = chain + "."
    return {chain for node in ast.walk(tree) if (chain := dotted(node, aliases))}


def dotted(node, aliases):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
        return aliases[node.value.id] + node.attr
    if isinstance(node, ast.Attribute) and (outer := dotted(node.value, aliases)):
        return f"{outer}.{node.attr}"
    return None


def exists(surface, chain):
    first, _, second = chain.partition(".")
    if first == "__version__":
        return True
    if first in surface["enums"] and second:
        return second in surface["enums"][first]
    if first in surface["classes"] and second:
        return second in surface["classes"][first]
    return first in surface["names"] and not second


def used_chains():
    return set().union(*(chains(path.read_text()) for path in SOURCES))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_of_tensorrt_in_the_source_exists(version):
    surface = read_surface(version)
    assert {chain for chain in used_chains() if not exists(surface, chain)} == GONE.get(version, set())


def test_the_walk_over_the_source_finds_names_and_what_is_wrong_with_them():
    found = chains(
        "import tensorrt as trt\nkinds = trt.LayerType\nx = kinds.QUANTIZE, kinds.NOTHING, trt.Bilder(trt.Logger.WARNING)"
    )
    expected = {"LayerType", "LayerType.QUANTIZE", "LayerType.NOTHING", "Bilder", "Logger", "Logger.WARNING"}
    assert found == expected
    assert {chain for chain in found if not exists(read_surface("10.3"), chain)} == {"LayerType.NOTHING", "Bilder"}
    assert {"BuilderFlag.FP16", "LayerType.QUANTIZE", "MemoryPoolType.WORKSPACE", "Runtime"} <= used_chains()


def test_every_member_of_tensorrt_in_the_source_was_exercised(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    older = [f"ICudaEngine.{name}" for name in ("num_io_tensors", "get_tensor_name", "get_tensor_shape", "get_tensor_dtype")]
    older += ["IExecutionContext.set_tensor_address", "IExecutionContext.execute_async_v3"]
    used = set()
    for number, (version, without) in enumerate([*((version, ()) for version in VERSIONS), ("8.6", older)]):
        device = Device(version, write_bundle(tmp_path / str(number)), dla_cores=1, without=tuple(without))
        assert device.run("build", "--dla-core", "0").status == 0
        assert device.run("predict", str(tmp_path / "a.png")).status == 0
        assert device.run("benchmark", "--images", "2", "--warm-up", "1").status == 0
        device.errors = [(0, "a", "b", "c")]
        assert device.run("build", "--force").status == 2
        used |= device.trt.used()
    of_tensorrt = {name for version in VERSIONS for members in read_surface(version)["classes"].values() for name in members}
    with_tensorrt = [path for path in SOURCES if "import tensorrt as trt" in path.read_text()]
    in_source = {
        node.attr
        for path in with_tensorrt
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    # WARNING is a value and not called; the others are of the runner's own objects, numpy's arrays and sets.
    assert in_source & of_tensorrt - used <= {"WARNING", "engine", "nbytes", "update"}
    assert {"set_flag", "parse", "execute_async_v2", "execute_async_v3", "set_output_type"} <= used


def test_the_fake_refuses_what_the_bindings_would_refuse():
    trt = FakeTensorRT("11.4", {"IBuilderConfig.create_timing_cache": lambda _, serialized_timing_cache: None})
    config = trt.make("IBuilderConfig")
    with pytest.raises(AttributeError):
        trt.BuilderFlag.FP16  # noqa: B018
    with pytest.raises(AttributeError):
        config.int8_calibrator  # noqa: B018
    with pytest.raises(AttributeError):
        config.speed = 9
    with pytest.raises(AttributeError, match=r"Builder.num_DLA_cores cannot be set"):
        trt.make("Builder").num_DLA_cores = 1
    with pytest.raises(TypeError, match="incompatible arguments"):
        config.create_timing_cache()
    with pytest.raises(TypeError, match="incompatible arguments"):
        config.create_timing_cache(b"", True)
    with pytest.raises(TypeError, match="incompatible arguments"):
        config.create_timing_cache(blob=b"")
    assert config.create_timing_cache(serialized_timing_cache=b"") is None
    assert not isinstance(trt.LayerType.QUANTIZE, int)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_surface_files_are_what_the_real_bindings_say(tmp_path, version):
    try:
        environment = collect.fetch(version, tmp_path)
    except collect.UnavailableError as error:
        pytest.skip(str(error))
    looked = subprocess.run([sys.executable, collect.__file__, "--look"], env=environment, capture_output=True, text=True)
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout) == read_surface(version)
    # What the fakes take for granted of the real classes: enums convert to numbers and compare, shapes are sequences.
    script = (
        "import tensorrt_bindings as trt\n"
        "trt.Logger(trt.Logger.WARNING)\n"
        "assert trt.DataType.FLOAT == trt.float32 and trt.DataType.HALF != trt.float32\n"
        "assert trt.LayerType.SCALE in (trt.LayerType.ACTIVATION, trt.LayerType.SCALE)\n"
        "assert 1 << int(trt.BuilderFlag.TF32) == 1 << trt.BuilderFlag.TF32.value\n"
        "shape = trt.Dims((1, 3, 6, 8))\n"
        "assert tuple(shape) == (1, 3, 6, 8) and shape[1] > 1\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_or_a_package_the_bindings_are_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setitem(collect.PACKAGES, "8.6", "no such requirement")
    with pytest.raises(collect.UnavailableError, match="no such requirement cannot be fetched"):
        collect.fetch("8.6", tmp_path)
    monkeypatch.setattr(collect.shutil, "which", lambda name: None)
    with pytest.raises(collect.UnavailableError, match="no C compiler"):
        collect.fetch("8.6", tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_surface_files_are_written_as_the_script_writes_them(version):
    assert collect.compact(read_surface(version)) == (Path(collect.__file__).parent / f"{version}.json").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_syntax_is_that_of_python_3_8(path):
    ast.parse(path.read_text(), feature_version=(3, 8))


NEWER = {
    *("removeprefix", "removesuffix", "is_relative_to", "readlink", "with_stem", "hardlink_to", "bit_count", "pairwise"),
    *("cancel_futures", "BooleanOptionalAction", "exit_on_error", "to_thread", "randbytes", "lcm", "nextafter", "unparse"),
    *(
        "aclosing",
        "nullcontext_async",
        "file_digest",
        "cache",
        "tomllib",
        "zoneinfo",
        "graphlib",
        "usedforsecurity",
        "batched",
    ),
}
"""Names that Python's library has only since 3.9 or later, of those that might come to mind here."""


@pytest.mark.slow
def test_it_runs_on_python_3_8(tmp_path):
    python = shutil.which("python3.8")
    if python is None or subprocess.run([python, "-c", "import numpy, PIL"], capture_output=True).returncode:
        pytest.skip("no python3.8 with numpy and Pillow")
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "a.png")
    script = (
        "from pathlib import Path\nfrom jetson_device import Device, write_bundle\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"for version in {VERSIONS}:\n"
        "    device = Device(version, write_bundle(folder / version))\n"
        "    assert device.run('build').status == 0\n"
        "    words = [str(folder / 'a.png'), str(folder / 'b.png'), '--out', str(folder / version / 'maps')]\n"
        "    done = device.run('predict', *words)\n"
        "    assert (done.status, [row['verdict'] for row in done.rows]) == (1, ['normal', 'error']), done\n"
        "    assert device.run('benchmark', '--images', '3').status == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(FOLDER.parents[2])])}
    done = subprocess.run([python, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_library_is_that_of_python_3_8(path):
    assert newer_than_3_8(path.read_text()) == []


def newer_than_3_8(source):
    tree = ast.parse(source)
    found = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in NEWER]
    found += [node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in NEWER]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [name.name for name in node.names if name.name in NEWER]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            found += [f"zip({word.arg}=…)" for word in node.keywords]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write_text":
            found += [f"write_text({word.arg}=…)" for word in node.keywords if word.arg == "newline"]
    # Annotations are never evaluated there; everything else is.
    return found + [
        ast.unparse(node) for node in evaluated(tree) if isinstance(node, ast.Subscript) and is_builtin(node.value)
    ]


def evaluated(node):
    """Yield the nodes of a tree but those within annotations."""
    skipped = {"annotation", "returns"}
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in skipped:
                yield child
                yield from evaluated(child)


def is_builtin(node):
    return isinstance(node, ast.Name) and node.id in {"dict", "list", "set", "tuple", "type", "deque", "frozenset", "Future"}


def test_what_is_newer_is_found():
    source = (
        "Pairs = list[int]\ndef f(x: list[int]) -> dict[str, int]:\n    y: set[int] = set()\n"
        "    return zip(x, y, strict=True), 'a'.removeprefix('b')\n"
    )
    assert newer_than_3_8(source) == ["removeprefix", "zip(strict=…)", "list[int]"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_annotations_are_not_evaluated_and_nothing_else_is_imported(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py":
        assert "from __future__ import annotations" in path.read_text()
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "out of the folder that is copied"
            roots.add((node.module or "").partition(".")[0] if node.level == 0 else "uadx_jetson")
    assert roots - set(sys.stdlib_module_names) <= {"numpy", "PIL", "tensorrt", "pycuda", "uadx_jetson"}
