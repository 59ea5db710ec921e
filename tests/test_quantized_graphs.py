"""Exported graphs of every method: they keep the rules of each profile, and compute what the quantizers do."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from networks import METHODS, SIDE, core, exported, noise, quantized, students
from onnx import TensorProto, numpy_helper

from uad_plugins.quantization import openvino_rules, tensorrt_rules
from uad_plugins.quantization.export import save_onnx, to_onnx, to_openvino
from uad_plugins.quantization.onnx_graph import attribute, with_float16_weights, with_int8_weights
from uad_plugins.quantization.scope import TorchGraph
from uad_plugins.quantization.torch_quantization import hooks, student_scales

PROFILES = {"tensorrt": tuple(tensorrt_rules.RULES), "openvino": tensorrt_rules.OPENVINO}


def run(model, image):
    """Execute every node as it stands."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": image.numpy()})


def distance(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("profile", "rule"), [(p, rule) for p, rules in PROFILES.items() for rule in rules])
def test_each_rule_holds(method, profile, rule):
    assert tensorrt_rules.check(exported(method, profile), [rule]) == {rule: []}
    assert tensorrt_rules.check(with_int8_weights(exported(method, profile)), [rule]) == {rule: []}


@pytest.mark.parametrize("method", METHODS)
def test_openvino_takes_int8_weights_as_they_are(method, tmp_path):
    """A zero-point that several weights share is subtracted when the network runs, and the convolution stays in float."""
    model = to_openvino(save_onnx(with_int8_weights(exported(method, "openvino")), tmp_path / "model.onnx"))
    subtracted = [node for node in model.get_ops() if node.get_type_name() == "Subtract"]
    assert not any(node.input_value(0).get_node().get_type_name() == "Convert" for node in subtracted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", [*PROFILES, "float"])
def test_a_graph_is_plain(method, profile):
    kinds = {node.op_type for node in exported(method, profile).graph.node}
    assert not kinds & {"Identity", "Constant", "Shape", "If", "Loop", "ConstantOfShape", "FakeQuantize"}
    # What is left stands behind a transposed convolution, whose weight has one scale for all channels.
    if method != "reverse_distillation" or profile != "tensorrt":
        assert "BatchNormalization" not in kinds
    assert {entry.version for entry in exported(method, profile).opset_import} == {17}


@pytest.mark.parametrize("method", METHODS)
def test_the_float_graph_computes_what_the_network_does(method):
    image = noise(1, seed=5)[0]
    expected = [value.detach().numpy() for value in core(method)(image)]
    for found, value in zip(run(exported(method, "float"), image), expected, strict=True):
        assert found.shape == value.shape
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5)
    assert distance(run(with_float16_weights(exported(method, "float")), image)[1], expected[1]) < 0.005


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", list(PROFILES))
def test_the_quantized_graph_computes_what_the_quantizers_do(method, profile):
    """Normalizations folded, weights as int8 or float: the same to the few values that round the other way."""
    image = noise(1, seed=5)[0]
    expected = quantized(method, profile)(image)[1].detach().numpy()
    found = run(exported(method, profile), image)[1]
    assert distance(found, expected) < 0.01
    assert distance(run(with_int8_weights(exported(method, profile)), image)[1], found) < 1e-6
    fp32 = core(method)(image)[1].detach().numpy()
    if method == "uninformed_students":
        # The zero of z-scores is arbitrary.
        found, fp32 = found - found.mean(), fp32 - fp32.mean()
    assert distance(found, fp32) < 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", list(PROFILES))
def test_openvino_agrees(method, profile, tmp_path):
    image = noise(1, seed=5)[0]
    path = tmp_path / "model.onnx"
    onnx.save(with_int8_weights(exported(method, profile)), path)
    # Converted, as OpenVinoDetector does: see there.
    compiled = openvino.Core().compile_model(openvino.convert_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert distance(compiled(image.numpy())[1], run(exported(method, profile), image)[1]) < 0.03


@pytest.mark.parametrize("method", METHODS)
def test_the_openvino_model_keeps_its_rules_on_disk(method, tmp_path):
    onnx.save(with_int8_weights(exported(method, "openvino")), tmp_path / "model.onnx")
    openvino.save_model(openvino.convert_model(tmp_path / "model.onnx"), tmp_path / "model.xml", compress_to_fp16=False)
    model = openvino.Core().read_model(tmp_path / "model.xml")
    assert not any(openvino_rules.check(model).values())
    placed = openvino_rules.placement(model)
    assert placed["quantized"] == placed["convolutions"] > 0
    assert placed == {**tensorrt_rules.placement(exported(method, "openvino")), "activations": placed["activations"]}


@pytest.mark.parametrize("method", METHODS)
def test_scope_student_leaves_the_teacher_in_float(method):
    graph = TorchGraph.of(core(method), noise(1)[0])
    mine = set(graph.convolutions_of(students(method)))
    assert mine
    assert set(graph.convolutions()) - mine
    with_weights = {name.split("__")[0].split(".", 1)[1] for name, _ in hooks(quantized(method, "openvino", "student"))}
    assert mine <= with_weights
    assert not with_weights & (set(graph.convolutions()) - mine)
    findings = tensorrt_rules.check(exported(method, "openvino", "student"), tensorrt_rules.OPENVINO, whole=False)
    assert not any(findings.values())
    assert tensorrt_rules.check(exported(method, "openvino", "student"), ["coverage"])["coverage"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", list(PROFILES))
def test_the_students_scales_get_gradients_and_the_teachers_are_left_out(method, profile):
    from copy import deepcopy

    model = deepcopy(quantized(method, profile))
    scales = student_scales(model, TorchGraph.of(core(method), noise(1)[0]), students(method))
    everything = {n for n, p in model.named_parameters() if n.startswith("__nncf_hooks") and p.is_floating_point()}
    assert scales < everything
    model.training = True
    model(noise(1, seed=7)[0])[0].sum().backward()
    named = dict(model.named_parameters())
    assert all(named[name].grad is not None for name in scales)
    # Of the image, and of each of the teacher's weights.
    teacher = set(TorchGraph.of(core(method), noise(1)[0]).convolutions())
    teacher -= set(TorchGraph.of(core(method), noise(1)[0]).convolutions_of(students(method)))
    frozen = {name.split("__0")[0].split("__1")[0].rpartition("hooks.")[2] for name in everything - scales}
    assert frozen >= teacher | {"images"}


@pytest.mark.parametrize("method", METHODS)
def test_training_meets_every_quantizer(method):
    """Quantizers act by the names of operations: in training they have to be the same operations."""
    from copy import deepcopy

    model = deepcopy(quantized(method, "openvino"))
    called = []
    places = [hook for _, hook in hooks(model)]
    for hook in set(places):
        hook.register_forward_hook(lambda hook, *_: called.append(hook))
    model.training = True
    model(noise(1)[0])
    assert Counter(called) == Counter(places)


def test_int8_weights_are_stored_as_int8():
    model = with_int8_weights(exported("reverse_distillation", "tensorrt"))
    sizes = {tensor.name: tensor for tensor in model.graph.initializer}
    assert all(t.data_type != TensorProto.FLOAT for t in sizes.values() if np.prod(t.dims) > 5000)
    ratio = len(model.SerializeToString()) / len(exported("reverse_distillation", "float").SerializeToString())
    assert ratio <= 0.27
    assert numpy_helper.to_array(next(t for t in sizes.values() if t.name.endswith("_int8"))).dtype == np.int8


def test_another_size_is_exported_for_that_size():
    model = to_onnx(core("stfpm"), (SIDE, 96))
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, SIDE, 96]
    assert attribute(model.graph.node[0], "kernel_shape") == [7, 7]


@pytest.mark.parametrize(("own", "expected"), [(None, "0"), ("90", "90")])
def test_nncf_may_compile_for_longer_than_a_minute(own, expected):
    name = "NNCF_EXTENSION_LOAD_TIMEOUT"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: own} if own else {})
    script = f"import os, uad_plugins.quantization.torch_quantization; print(os.environ['{name}'])"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]
