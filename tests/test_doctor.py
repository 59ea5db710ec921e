"""``uadx doctor``: what can be used here, and what would make the rest usable."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from uad_plugins import doctor
from uad_plugins.hookspecs import Requirement, RuntimePlugin
from uad_plugins.registry import registry


@pytest.fixture
def hide(monkeypatch):
    """Make packages as if they were not installed."""
    real = importlib.util.find_spec

    def hidden(*names):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in names else real(name, *rest))

    return hidden


def found(kind):
    return {item.name: item for item in doctor.diagnose() if item.kind == kind}


def test_doctor_names_everything_that_is_missing(monkeypatch):
    gone = {"onnx": "pip install 'uadx[onnx]'", "nncf": "pip install 'uadx[openvino]'"}

    def examine(requirement):
        missing = requirement.module in gone
        return doctor.Diagnosis("package", requirement.module, not missing, "gone" * missing, requirement.install * missing)

    monkeypatch.setattr(doctor, "examine", examine)
    both = [item for item in doctor.diagnose() if "onnx gone" in item.detail and "nncf gone" in item.detail]
    assert both
    assert all(set(item.fix.split("; ")) == set(gone.values()) for item in both)


def test_doctor_names_what_is_missing_and_how_to_get_it(uadx):
    status, out, _ = uadx("doctor", "--json")
    document = json.loads(out)
    assert status == 0
    components = {(item["kind"], item["name"]): item for item in document["components"]}
    assert components["package", "torch"]["usable"] is True
    assert components["runtime", "torch"]["usable"] is True
    for item in document["components"]:
        assert item["usable"] or item["fix"]
    assert document["machine"]["cores"] == len(os.sched_getaffinity(0))


def test_what_doctor_says_to_run_can_be_copied(uadx, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    status, out, _ = uadx("doctor", "--json")
    assert status == 0
    missing = [item for item in json.loads(out)["components"] if not item["usable"]]
    assert {item["name"] for item in missing} >= {"torch", "tensorrt", "pycuda", "openvino-int8"}
    assert [item["fix"] for item in missing if "#" in item["fix"]] == []
    fixes = {item["fix"] for item in missing if item["name"] in {"tensorrt", "pycuda"}}
    assert fixes == {"pip install 'uadx[tensorrt]'"}
    (engine,) = [item["detail"] for item in missing if (item["kind"], item["name"]) == ("runtime", "tensorrt")]
    reasons = "tensorrt not installed (needs an NVIDIA GPU; JetPack brings it); pycuda not installed (needs an NVIDIA GPU)"
    assert engine == reasons


def test_a_compiler_without_a_gpu_is_nothing_to_warn_of(tmp_path):
    """As on a build machine: torch's door to the compiler, which engines may open in their trial, misses the GPU."""
    code = (
        "import importlib\nfrom uadx.app import main\nfrom uad_plugins import doctor\n"
        "from uad_plugins.hookspecs import Requirement\n"
        "def trial():\n    return importlib.import_module('torch.utils.cpp_extension').CUDA_HOME\n"
        "doctor.PACKAGES += (Requirement('torch.utils.cpp_extension', 'pip install it', trial),)\nmain(['doctor', '--json'])"
    )
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("UADX_DEBUG", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert "gpus" not in document["machine"]
    # The compiler was looked for, and found.
    assert f"installed: {tmp_path}" in [item["detail"] for item in document["components"]]


def test_a_requirement_below_a_package_that_is_not_there_is_missing():
    found = doctor.examine(Requirement("no_such_package.part", "pip install it"))
    assert (found.usable, found.detail, found.fix) == (False, "not installed", "pip install it")


def test_what_no_command_provides_stands_beside_the_reason():
    found = doctor.examine(Requirement("no_such_package", "pip install it", needs="a GPU"))
    assert (found.usable, found.detail, found.fix) == (False, "not installed (needs a GPU)", "pip install it")
    found = doctor.examine(Requirement("json", "pip install it", lambda: "no driver", needs="a GPU"))
    assert (found.usable, found.detail, found.fix) == (False, "installed: no driver (needs a GPU)", "pip install it")
    found = doctor.examine(Requirement("json", "pip install it", lambda: None, needs="a GPU"))
    assert (found.usable, found.detail, found.fix) == (True, "installed", "")


def test_without_torch_no_quantizer_can_be_used(hide):
    hide("torch", "anomalib")
    quantizers = found("quantizer")
    assert set(quantizers) >= {"fp32", "openvino-int8", "nncf-qat"}
    for item in quantizers.values():
        assert (item.usable, "torch not installed" in item.detail) == (False, True)
        assert "pip install 'uadx[train]'" in item.fix.split("; ")
    assert found("runtime")["openvino"].usable is True


def test_an_engine_is_told_what_it_needs_and_no_more(hide):
    hide("openvino", "onnxruntime")
    engines = found("runtime")
    assert engines["openvino"].fix == "pip install 'uadx[openvino-runtime]'"
    assert engines["onnxruntime"].fix == "pip install 'uadx[onnx-runtime]'"
    assert found("package")["openvino"].fix == "pip install 'uadx[openvino]'"


def test_a_plugins_own_trial_of_a_known_package_runs(monkeypatch):
    own = Requirement("torch", "pip install acme", lambda: "too old for acme")
    plugin = RuntimePlugin("acme", "an engine", lambda folder: None, requires=(own,))
    real = type(registry()).items
    monkeypatch.setattr(
        type(registry()), "items", lambda self, kind: [*real(self, kind), *([plugin] if kind == "runtime" else [])]
    )
    item = found("runtime")["acme"]
    assert (item.usable, item.fix) == (False, "pip install acme")
    assert item.detail.endswith("too old for acme")


def test_a_broken_torch_is_a_line_of_the_report(uadx, monkeypatch):
    """As one whose libraries are not there: that is what doctor is asked for."""
    real = importlib.import_module

    def broken(name, *rest):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", broken)
    status, out, err = uadx("doctor", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert "gpus" not in document["machine"]
    (torch,) = [item for item in document["components"] if (item["kind"], item["name"]) == ("package", "torch")]
    assert torch["usable"] is False
    assert torch["detail"].endswith("OSError: libcudart.so.12: cannot open shared object file")


def test_commands_stand_below_the_table_whole(uadx, hide):
    hide("tensorrt", "pycuda", "onnx", "openvino")
    status, out, _ = uadx("doctor")
    assert status == 0
    commands = [line for line in out.splitlines() if line.startswith("pip install")]
    assert "pip install 'uadx[tensorrt]'  # for tensorrt, pycuda" in commands
    assert [line.partition("  # for ")[0] for line in commands] == [
        "pip install 'uadx[openvino]'",
        "pip install 'uadx[onnx]'",
        "pip install 'uadx[tensorrt]'",
        "pip install 'uadx[openvino-runtime]'",
    ]
