"""What TensorRT's Python API offers in each version, written to a JSON file a version.

NVIDIA's bindings are packages of their own, and load without TensorRT or a GPU beside libraries of a few empty functions
(``stub.c``). ``python collect.py`` fetches them with pip, looks at their classes, and writes the files that lie beside it.
It needs a C compiler, and an interpreter that all these versions have a package for (CPython 3.11 on x86-64 Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent

PACKAGES = {
    "8.6": "tensorrt-bindings==8.6.1",
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.14": "tensorrt-cu13-bindings==10.14.1.48.post1",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")

CLASSES = (
    "Builder",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "INetworkDefinition",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "ParserError",
    "Runtime",
)

ENUMS = ("BuilderFlag", "DataType", "DeviceType", "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag")


class UnavailableError(Exception):
    """The bindings cannot be had here."""


def fetch(version: str, folder: Path) -> dict[str, str]:
    """Make the bindings of a version importable as ``tensorrt_bindings``; returns the environment to do it in."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnavailableError("no C compiler")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGES[version]]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UnavailableError(f"{PACKAGES[version]} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    site, lib = folder / "site", folder / "lib"
    lib.mkdir()
    zipfile.ZipFile(wheels[0]).extractall(site)
    # The bindings import the package of the real libraries where there is one.
    (site / "tensorrt_libs.py").touch()
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.partition('.')[0]}"
        flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(lib / name)]
        subprocess.run([compiler, *flags, str(HERE / "stub.c")], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(lib), "PYTHONPATH": str(site)}


def surface(version: str, folder: Path) -> dict:
    """Return what the bindings of a version offer."""
    done = subprocess.run(
        [sys.executable, __file__, "--look"], env=fetch(version, folder), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def look() -> dict:
    """Return what the ``tensorrt_bindings`` that can be imported here offers."""
    import tensorrt_bindings as trt

    return {
        "version": trt.__version__,
        "names": sorted(name for name in vars(trt) if not name.startswith("_")),
        "constants": {name: value.name for name, value in vars(trt).items() if isinstance(value, trt.DataType)},
        "enums": {name: _members(getattr(trt, name)) for name in ENUMS},
        "classes": {name: _class(getattr(trt, name)) for name in CLASSES},
    }


def _members(enum: type) -> dict[str, int]:
    return {name: int(value) for name, value in enum.__members__.items()}


def _class(cls: type) -> dict:
    """Members of a class: ``{"calls": [[required, parameters, returns], …]}`` of a method, one for each overload,
    ``{"type": …, "settable": …}`` of a property, ``{"constant": …}`` of a member of an enum."""
    found = {}
    for name in dir(cls):
        member = getattr(cls, name)
        if isinstance(member, property):
            returns = re.search(r"-> *([\w.:]+)", member.fget.__doc__ or "")
            found[name] = {"type": _last(returns[1]) if returns else "", "settable": member.fset is not None}
        elif name == "__init__" or (callable(member) and not name.startswith("_") and not isinstance(member, type)):
            found[name] = {"calls": _overloads(name, member.__doc__ or "")}
        elif hasattr(type(member), "__members__"):
            found[name] = {"constant": member.name}
    return found


def _overloads(name: str, text: str) -> list:
    pattern = rf"^(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> (.+))?$"
    return [
        _signature(match[1], match[2] or "")
        for match in re.finditer(pattern, text, re.MULTILINE)
        if not match[1].startswith("*args")
    ]


def _signature(parameters: str, returns: str) -> list:
    # Commas within brackets separate nothing: "list[int, int]", "flag: Severity = <Severity.WARNING: 2>".
    words = [word.strip() for word in re.split(r",(?![^\[(<]*[\])>])", parameters)][1:]
    required = sum("=" not in word for word in words)
    return [required, [word.partition(":")[0].strip() for word in words], _last(returns)]


def _last(name: str) -> str:
    return re.split(r"[.:]", name.strip())[-1]


def compact(content: dict) -> str:
    """Write JSON with one line a member: small, and a change shows as a line."""
    classes = {
        name: {key: json.dumps(value) for key, value in sorted(members.items())}
        for name, members in content["classes"].items()
    }
    others = {key: json.dumps(value) for key, value in content.items() if key != "classes"}
    lines = [f' "{key}": {value}' for key, value in others.items()]
    blocks = [
        f'  "{name}": {{\n' + ",\n".join(f'   "{key}": {value}' for key, value in members.items()) + "\n  }"
        for name, members in classes.items()
    ]
    return "{\n" + ",\n".join([*lines, ' "classes": {\n' + ",\n".join(blocks) + "\n }"]) + "\n}\n"


def main() -> None:
    """Write the file of each version, or print what can be imported here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--look", action="store_true", help="print what this interpreter's bindings offer")
    if parser.parse_args().look:
        json.dump(look(), sys.stdout)
        return
    for version in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            (HERE / f"{version}.json").write_text(compact(surface(version, Path(folder))))


if __name__ == "__main__":
    main()
