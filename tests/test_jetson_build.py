"""The Jetson runner builds: flags, layers and files of the engine, in each version of TensorRT."""

from __future__ import annotations

import json

import pytest
from jetson_device import HEAD, NETWORK, VERSIONS, Device, Layer, write_bundle

WEAKLY_TYPED = VERSIONS[:-1]


def test_the_flags_are_those_that_the_version_has(device):
    assert device.run("build").status == 0
    expected = [] if device.version == "11.4" else ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    assert device.flags() == expected


def test_the_network_is_strongly_typed_in_11_and_of_explicit_batch_before(device):
    device.run("build")
    ((flags,),) = device.trt.called("Builder.create_network")
    kinds = device.trt.NetworkDefinitionCreationFlag
    assert flags == 1 << (kinds.STRONGLY_TYPED if device.version == "11.4" else kinds.EXPLICIT_BATCH).value


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_the_head_alone_is_kept_in_fp32(tmp_path, version):
    device = Device(version, write_bundle(tmp_path / "bundle"))
    device.run("build")
    kept = [layer.state for layer in device._layers if hasattr(layer.state, "properties")]
    assert [state.name for state in kept] == HEAD
    assert all(state.properties == {"precision": device.trt.float32} for state in kept)
    assert device.trt.called("ILayer.set_output_type") == [(0, device.trt.float32)] * len(HEAD)


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_a_network_without_quantization_gets_no_int8_and_the_same_head(tmp_path, version):
    plain = [layer for layer in NETWORK if layer.kind not in {"QUANTIZE", "DEQUANTIZE"}]
    names = {"dq0": "input", "dq1": "relu0"}
    plain = [Layer(x.name, x.kind, tuple(names.get(n, n) for n in x.inputs), x.outputs, x.channels, x.dtype) for x in plain]
    device = Device(version, write_bundle(tmp_path / "bundle"), network=plain)
    device.run("build")
    assert device.flags() == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert [layer.state.name for layer in device._layers if hasattr(layer.state, "properties")] == HEAD


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_a_difference_of_features_is_head_though_its_inputs_are_not(tmp_path, version):
    network = [
        Layer("teacher", "CONVOLUTION", ("input",), ("teacher",)),
        Layer("student", "CONVOLUTION", ("input",), ("student",)),
        Layer("subtract", "ELEMENTWISE", ("teacher", "student"), ("subtract",)),
        Layer("square", "ELEMENTWISE", ("subtract", "subtract"), ("map",)),
        Layer("largest", "REDUCE", ("map",), ("score",)),
    ]
    device = Device(version, write_bundle(tmp_path / "bundle"), network=network)
    device.run("build")
    kept = [layer.state.name for layer in device._layers if hasattr(layer.state, "properties")]
    assert kept == ["subtract", "square", "largest"]


@pytest.mark.parametrize("version", WEAKLY_TYPED)
def test_fp16_can_be_left_out(tmp_path, version):
    device = Device(version, write_bundle(tmp_path / "bundle"))
    device.run("build", "--no-fp16")
    assert device.flags() == ["INT8"]
    assert device.trt.called("ILayer.set_output_type") == []


def test_the_workspace_is_limited(device):
    device.run("build", "--workspace", "256")
    assert device.trt.called("IBuilderConfig.set_memory_pool_limit") == [(device.trt.MemoryPoolType.WORKSPACE, 256 << 20)]


def test_an_engine_that_fits_is_not_built_again(device):
    assert device.run("build").status == 0
    assert (device.bundle / "engine" / "model.engine").read_bytes() == b"engine"
    again = device.run("build")
    assert again.status == 0
    assert "stays as it is" in again.err
    assert len(device.trt.called("Builder.build_serialized_network")) == 1
    device.run("build", "--force")
    assert len(device.trt.called("Builder.build_serialized_network")) == 2


def test_the_sidecar_says_what_the_engine_was_built_from(device):
    device.run("build")
    sidecar = json.loads((device.bundle / "engine" / "model.engine.json").read_text())
    assert sidecar.pop("trtexec").startswith("trtexec --onnx=")
    assert {len(sidecar.pop(key)) for key in ("onnx_sha256", "engine_sha256")} == {64}
    assert sidecar == {
        "schema": "uadx.engine/1",
        "tensorrt": device.trt.__version__,
        "gpu": "Orin",
        "compute_capability": "8.7",
        "options": {"fp16": True, "workspace_mib": 1024, "dla_core": None},
    }
    assert {path.name for path in (device.bundle / "engine").iterdir()} == {
        "model.engine",
        "model.engine.json",
        f"timing-{device.trt.__version__}.cache",
    }


def test_timings_of_an_earlier_build_are_used(device):
    device.run("build")
    device.run("build", "--force")
    assert device.trt.called("IBuilderConfig.create_timing_cache") == [(b"",), (b"timings",)]
    assert device.trt.called("ITimingCache.serialize") == [(), ()]


def test_timings_that_do_not_fit_are_replaced(device):
    cache = device.bundle / "engine" / f"timing-{device.trt.__version__}.cache"
    cache.parent.mkdir()
    cache.write_bytes(b"of another device")
    done = device.run("build")
    assert f"note: {cache} is of another device or version" in done.err
    assert device.trt.called("IBuilderConfig.create_timing_cache") == [(b"of another device",), (b"",)]
    assert cache.read_bytes() == b"timings"


def test_dla_takes_what_it_can_and_the_gpu_the_rest(tmp_path):
    for version in VERSIONS:
        device = Device(version, write_bundle(tmp_path / version), dla_cores=1)
        done = device.run("build", "--dla-core", "0")
        assert done.status == 0
        assert "DLA takes no quantization nodes" in done.err
        assert "GPU_FALLBACK" in device.flags()
        assert device.trt.called("IBuilderConfig.default_device_type") == [(device.trt.DeviceType.DLA,)]
        assert device.trt.called("IBuilderConfig.DLA_core") == [(0,)]
        assert "--useDLACore=0 --allowGPUFallback" in done.err


def test_a_dla_core_that_is_not_there_is_refused(device):
    done = device.run("build", "--dla-core", "1")
    assert done.status == 2
    assert done.err.splitlines()[-1] == "error: no DLA core 1: this device has 0"


def test_dla_without_half_precision_is_refused(tmp_path):
    device = Device("8.6", write_bundle(tmp_path / "bundle"), dla_cores=2)
    done = device.run("build", "--dla-core", "1", "--no-fp16")
    assert done.status == 2
    assert done.err.endswith("error: DLA computes in FP16 or INT8: --dla-core and --no-fp16 exclude each other\n")


def test_the_equal_trtexec_line(device):
    done = device.run("build", "--workspace", "512")
    words = done.err.partition(f"the same with trtexec, in {device.bundle}: ")[2].split()
    expected = [
        "trtexec",
        "--onnx=model.onnx",
        "--saveEngine=engine/model.engine",
        f"--timingCacheFile=engine/timing-{device.trt.__version__}.cache",
        "--memPoolSize=workspace:512",
    ]
    if device.version != "11.4":
        listed = ",".join(f"{name}:fp32" for name in HEAD)
        expected += ["--int8", "--fp16", "--precisionConstraints=obey"]
        expected += [f"--layerPrecisions={listed}", f"--layerOutputTypes={listed}"]
    assert words == [*expected, "--skipInference"]
    sidecar = json.loads((device.bundle / "engine" / "model.engine.json").read_text())
    assert sidecar["trtexec"].split() == words


def test_before_8_6_trtexec_calls_it_build_only(tmp_path):
    device = Device("8.6", write_bundle(tmp_path / "bundle"))
    device.trt.__version__ = "8.5.2.2"
    assert device.run("build").err.endswith(" --buildOnly\n")


def test_errors_of_the_parser_name_the_nodes(tmp_path):
    helper = pytest.importorskip("onnx").helper
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="/a/Relu"), helper.make_node("Nms", ["y"], ["z"], name="/b/Nms")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [])).SerializeToString()
    for version in VERSIONS:
        errors = [(1, "/b/Nms", "Nms", "In node 1:\n UNSUPPORTED_NODE"), (7, "", "", "INVALID_GRAPH")]
        device = Device(version, write_bundle(tmp_path / version, onnx=model), errors=errors)
        done = device.run("build")
        assert done.status == 2
        assert done.err.splitlines()[-1] == (
            f"error: {device.bundle / 'model.onnx'}: TensorRT {device.trt.__version__} cannot take this network: "
            "node /b/Nms (Nms): In node 1: UNSUPPORTED_NODE; node number 7: INVALID_GRAPH"
        )
        assert not (device.bundle / "engine").exists()


def test_no_gpu_is_one_line(device):
    device.cuda.fails = True
    done = device.run("build")
    assert (done.status, done.err) == (2, "error: CUDA: cuInit failed: no CUDA-capable device is detected\n")


@pytest.mark.parametrize("changed", [b"onnX", b"onn"])
def test_a_changed_onnx_file_is_refused_before_tensorrt_sees_it(device, changed):
    (device.bundle / "model.onnx").write_bytes(changed)
    done = device.run("build")
    assert done.status == 2
    assert "model.onnx: is not the file that was bundled" in done.err
    assert device.trt.calls == []


def test_the_engine_can_lie_elsewhere(device, tmp_path):
    device.run("build", "--engines", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model.engine").is_file()
    assert not (device.bundle / "engine").exists()
    line = json.loads((tmp_path / "elsewhere" / "model.engine.json").read_text())["trtexec"]
    assert f"--saveEngine={tmp_path.resolve() / 'elsewhere' / 'model.engine'}" in line.split()
