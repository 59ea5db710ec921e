"""The rules for graphs: a broken graph is caught by the rule it breaks."""

from itertools import pairwise

import numpy as np
import onnx
import openvino
import pytest
from networks import SIDE, exported
from onnx import ModelProto, helper

from uad_plugins.quantization import openvino_rules, tensorrt_rules
from uad_plugins.quantization.graph import ADD, CONV, INPUT, Graph
from uad_plugins.quantization.onnx_graph import OnnxGraph, set_initializer
from uad_plugins.quantization.tensorrt_versions import PARSERS


def copy_of(method="reverse_distillation"):
    model = ModelProto()
    model.CopyFrom(exported(method, "tensorrt"))
    return model


def first(model, kind, test=lambda node: True):
    return next(node for node in model.graph.node if node.op_type == kind and test(node))


def weight_quantizer(model, kind="Conv"):
    """Return the QuantizeLinear of the first weight of a kind of convolution, and the DequantizeLinear behind it."""
    graph = OnnxGraph.of(model)
    name = next(name for name in graph.convolutions() if graph.nodes[name].op_type == kind)
    dequantize = graph.nodes[graph.inputs[name][1]]
    return graph.nodes[dequantize.input[0]], dequantize


def newer_opset(model):
    model.opset_import[0].version = 18


def foreign_operator(model):
    first(model, "Relu").domain = "org.openvinotoolkit"


def free_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def no_quantizer(model):
    for node in list(model.graph.node):
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            node.op_type = "Relu"
            del node.input[1:]


def no_zero_point(model):
    del first(model, "QuantizeLinear").input[2:]


def computed_scale(model):
    node = first(model, "QuantizeLinear")
    scale = node.input[1]
    model.graph.node.insert(0, helper.make_node("Abs", [scale], ["abs_scale"]))
    node.input[1] = "abs_scale"


def identity_on_a_scale(model):
    node = first(model, "QuantizeLinear")
    model.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["same_scale"]))
    node.input[1] = "same_scale"


def unsigned(model):
    set_initializer(model, "u8", np.zeros((), np.uint8))
    first(model, "QuantizeLinear").input[2] = "u8"


def shifted(model):
    set_initializer(model, "shifted", np.array(3, np.int8))
    first(model, "QuantizeLinear").input[2] = "shifted"


def zero_scale(model):
    set_initializer(model, "zero_scale", np.array(0, np.float32))
    first(model, "QuantizeLinear").input[1] = "zero_scale"


def short_scale(model):
    quantize, dequantize = weight_quantizer(model)
    set_initializer(model, "short", np.ones(3, np.float32))
    set_initializer(model, "short_zero", np.zeros(3, np.int8))
    for node in (quantize, dequantize):
        node.input[1], node.input[2] = "short", "short_zero"


def activation_per_channel(model):
    graph = OnnxGraph.of(model)
    node = first(model, "QuantizeLinear", lambda node: node.output[0] in graph.moving())
    set_initializer(model, "many", np.ones(3, np.float32))
    node.input[1] = "many"


def wrong_axis(model):
    for node in weight_quantizer(model):
        next(item for item in node.attribute if item.name == "axis").i = 1


def transposed_per_channel(model):
    quantize, dequantize = weight_quantizer(model, "ConvTranspose")
    channels = OnnxGraph.of(model).arrays[quantize.input[0]].shape[1]
    set_initializer(model, "channels", np.ones(channels, np.float32))
    set_initializer(model, "channels_zero", np.zeros(channels, np.int8))
    for node in (quantize, dequantize):
        node.input[1], node.input[2] = "channels", "channels_zero"
        node.attribute.append(helper.make_attribute("axis", 1))


def quantize_tensor(model, source, consumer):
    """Put a quantizer between a tensor and one consumer of it."""
    set_initializer(model, "one", np.array(0.1, np.float32))
    set_initializer(model, "nought", np.array(0, np.int8))
    nodes = [
        helper.make_node("QuantizeLinear", [source, "one", "nought"], ["more_q"]),
        helper.make_node("DequantizeLinear", ["more_q", "one", "nought"], ["more_dq"]),
    ]
    place = list(model.graph.node).index(consumer)
    for port, name in enumerate(consumer.input):
        if name == source:
            consumer.input[port] = "more_dq"
    for node in reversed(nodes):
        model.graph.node.insert(place, node)


def quantized_main_branch(model):
    graph = OnnxGraph.of(model)
    name, main, _ = graph.additions()[0]
    quantize_tensor(model, main, next(node for node in model.graph.node if node.output[0] == name))


def float_skip_branch(model):
    graph = OnnxGraph.of(model)
    name, _, skip = graph.additions()[1]
    source = graph.nodes[graph.nodes[skip].input[0]].input[0]
    addition = next(node for node in model.graph.node if node.output[0] == name)
    for port, tensor in enumerate(addition.input):
        if tensor == skip:
            addition.input[port] = source


def float_weight(model):
    quantize, dequantize = weight_quantizer(model)
    name = next(node for node in model.graph.node if dequantize.output[0] in node.input)
    name.input[1] = quantize.input[0]


def quantized_head(model):
    graph = OnnxGraph.of(model)
    node = first(model, "Resize", lambda node: node.output[0] in graph.head())
    quantize_tensor(model, node.input[0], node)


def quantized_gate(model):
    model.CopyFrom(exported("gated_stfpm", "tensorrt"))
    gates = OnnxGraph.of(model).gates()
    node = first(model, "Conv", lambda node: node.output[0] in gates)
    quantize_tensor(model, node.input[0], node)


def quantized_variance(model):
    model.CopyFrom(exported("conditional_stfpm", "tensorrt"))
    graph = OnnxGraph.of(model)
    node = first(model, "Sub", lambda node: node.output[0] in graph.before(graph.convolutions()))
    quantize_tensor(model, node.input[0], node)


@pytest.mark.parametrize(
    ("break_it", "rule"),
    [
        (newer_opset, "opset"),
        (foreign_operator, "operators"),
        (free_batch, "static shapes"),
        (no_quantizer, "quantized"),
        (no_zero_point, "complete quantizers"),
        (computed_scale, "complete quantizers"),
        (identity_on_a_scale, "no identity on constants"),
        (identity_on_a_scale, "complete quantizers"),
        (unsigned, "signed"),
        (shifted, "zero points are 0"),
        (zero_scale, "scales"),
        (short_scale, "scales"),
        (activation_per_channel, "per-channel only on weights"),
        (wrong_axis, "axis of weights"),
        (transposed_per_channel, "transposed convolutions"),
        (quantized_main_branch, "residual additions"),
        (float_skip_branch, "residual additions"),
        (float_weight, "coverage"),
        (quantized_head, "float head"),
        (quantized_gate, "float gates"),
        (quantized_variance, "float gates"),
    ],
)
def test_a_broken_graph_is_caught(break_it, rule):
    model = copy_of()
    break_it(model)
    assert tensorrt_rules.check(model)[rule]


def test_every_rule_has_a_graph_that_breaks_it():
    (mark,) = test_a_broken_graph_is_caught.pytestmark
    assert {rule for _, rule in mark.args[1]} == set(tensorrt_rules.RULES)


def test_the_version_of_tensorrt_can_be_chosen():
    model = copy_of()
    model.opset_import[0].version = 19
    assert tensorrt_rules.check(model, ["opset"], version="10.3") == {"opset": []}
    assert tensorrt_rules.check(model, ["opset"]) == {"opset": ["opset 19 is newer than 17"]}


def test_a_graph_may_be_good_for_some_versions_of_tensorrt_alone():
    assert not any(tensorrt_rules.by_version(copy_of()).values())
    model = copy_of()
    relu = first(model, "Relu")
    relu.op_type = "Mish"
    mish = [f"{relu.name or relu.output[0]}: ai.onnx::Mish"]
    assert tensorrt_rules.by_version(model) == {"8.5": mish, "8.6": mish, "10.3": mish, "10.15": [], "11": []}
    relu.op_type = "LayerNormalization"
    assert [version for version, wrong in tensorrt_rules.by_version(model).items() if wrong] == ["8.5"]
    model = copy_of()
    model.opset_import[0].version = 20
    assert [version for version, wrong in tensorrt_rules.by_version(model).items() if not wrong] == ["10.3", "10.15", "11"]
    foreign_operator(model)
    assert all(tensorrt_rules.by_version(model).values())


def test_newer_parsers_take_what_older_ones_took():
    parsers = list(PARSERS.values())
    for older, newer in pairwise(parsers):
        assert older.operators <= newer.operators
        assert older.max_opset <= newer.max_opset


def test_openvino_rules_find_a_quantized_head_and_float_weights(tmp_path):
    model = ModelProto()
    model.CopyFrom(exported("stfpm", "openvino"))
    quantized_head(model)
    onnx.save(model, tmp_path / "model.onnx")
    findings = openvino_rules.check(openvino.convert_model(tmp_path / "model.onnx"))
    assert findings["float head"]
    onnx.save(exported("stfpm", "float"), tmp_path / "float.onnx")
    findings = openvino_rules.check(openvino.convert_model(tmp_path / "float.onnx"))
    assert findings["quantized"]
    assert findings["coverage"]


def test_openvino_rules_find_arithmetic_on_a_quantized_activation(tmp_path):
    model = ModelProto()
    model.CopyFrom(exported("stfpm", "openvino"))
    graph = OnnxGraph.of(model)
    name = graph.convolutions()[0]
    node = next(node for node in model.graph.node if node.output[0] == name)
    model.graph.node.insert(list(model.graph.node).index(node), helper.make_node("Sigmoid", [node.input[0]], ["squashed"]))
    node.input[0] = "squashed"
    onnx.save(model, tmp_path / "model.onnx")
    findings = openvino_rules.check(openvino.convert_model(tmp_path / "model.onnx"))
    assert [line.rpartition(": ")[2] for line in findings["consumers"]] == ["feeds Sigmoid"]


def test_openvino_rules_find_a_shape_that_is_not_fixed(tmp_path):
    onnx.save(exported("stfpm", "openvino"), tmp_path / "model.onnx")
    model = openvino.convert_model(tmp_path / "model.onnx")
    assert openvino_rules.check(model)["static shapes"] == []
    model.reshape([-1, 3, SIDE, SIDE])
    assert "images: its shape is not fixed" in openvino_rules.check(model)["static shapes"]


def test_openvino_rules_find_quantized_additions_and_signs_behind_relu(tmp_path):
    """A graph by TensorRT's rules has both."""
    onnx.save(exported("stfpm", "tensorrt"), tmp_path / "model.onnx")
    findings = openvino_rules.check(openvino.convert_model(tmp_path / "model.onnx"))
    assert findings["residual additions in float"]
    assert all(line.endswith("the skip branch is quantized") for line in findings["residual additions in float"])
    assert findings["unsigned behind ReLU"]
    assert all(line.endswith("behind a ReLU") for line in findings["unsigned behind ReLU"])


def test_openvino_rules_find_a_quantized_gate(tmp_path):
    onnx.save(exported("gated_stfpm", "openvino"), tmp_path / "model.onnx")
    assert openvino_rules.check(openvino.convert_model(tmp_path / "model.onnx"))["float gates"] == []
    model = ModelProto()
    quantized_gate(model)
    onnx.save(model, tmp_path / "quantized.onnx")
    assert openvino_rules.check(openvino.convert_model(tmp_path / "quantized.onnx"))["float gates"]


def test_every_openvino_rule_is_broken_by_a_test():
    """Those of the five tests above."""
    broken = {"float head", "float gates", "quantized", "coverage", "consumers", "static shapes"}
    broken |= {"residual additions in float", "unsigned behind ReLU"}
    assert broken == {*openvino_rules.RULES, "coverage", "static shapes"}


def test_the_skip_branch_is_the_one_with_fewer_convolutions():
    """Written the other way round, the addition of a projecting block is understood as well."""
    for first_port, second_port in ((0, 1), (1, 0)):
        graph = Graph()
        for name, kind in (("x", INPUT), ("a", CONV), ("b", CONV), ("project", CONV), ("add", ADD), ("next", CONV)):
            graph.kinds[name] = kind
            graph.channels[name] = 8
        for producer, consumer, port in (("x", "a", 0), ("a", "b", 0), ("x", "project", 0), ("add", "next", 0)):
            graph.connect(producer, consumer, port)
        graph.connect("b", "add", first_port)
        graph.connect("project", "add", second_port)
        assert graph.additions() == [("add", "b", "project")]


def test_a_smoothing_filter_belongs_to_the_head():
    graph = OnnxGraph.of(exported("reverse_distillation", "float"))
    filters = [name for name, kind in graph.kinds.items() if kind == CONV and name not in graph.convolutions()]
    assert filters
    assert set(filters) <= graph.head()
