"""Which layers of real networks the Jetson runner keeps in FP32.

The networks are exported here, and their nodes taken for the layers that TensorRT's parser makes of them. That parser splits
some nodes into several layers; what matters is the same: which node follows which, and which is a convolution.
"""

from __future__ import annotations

import io

import pytest
from jetson_device import Device, Layer, write_bundle

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

KINDS = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "Relu": "ACTIVATION",
    "Clip": "ACTIVATION",
    "BatchNormalization": "SCALE",
    "Constant": "CONSTANT",
    "Shape": "SHAPE",
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Max"), "ELEMENTWISE"),
}


@pytest.fixture(params=["stfpm", "reverse_distillation"])
def model(request, monkeypatch):
    import timm
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
    from anomalib.models.image.stfpm.torch_model import STFPMModel

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *words, **named: create(*words, **{**named, "pretrained": False}))
    layers = ["layer1", "layer2", "layer3"]
    if request.param == "stfpm":
        return STFPMModel(layers=layers, backbone="resnet18").eval()
    return ReverseDistillationModel("resnet18", (64, 64), layers, "add", pre_trained=False).eval()


class ScoreAndMap(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        output = self.model(images)
        return output.pred_score, output.anomaly_map


def layers_of(model):
    buffer = io.BytesIO()
    torch.onnx.export(ScoreAndMap(model), torch.zeros(1, 3, 64, 64), buffer, dynamo=False, opset_version=17)
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(buffer.getvalue())).graph
    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    stored = {weights.name for weights in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in stored:
            stored.add(node.output[0])
            continue
        dims = types[node.input[0]].shape.dim if node.op_type in {"Conv", "ConvTranspose"} else ()
        kind = types.get(node.output[0])
        yield Layer(
            node.name,
            KINDS.get(node.op_type, "REDUCE"),
            tuple(name for name in node.input if name and name not in stored),
            tuple(node.output),
            dims[1].dim_value if len(dims) else 8,
            "FLOAT" if kind is None or kind.elem_type == onnx.TensorProto.FLOAT else "INT32",
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_of_real_networks_the_map_is_kept_in_fp32_and_no_convolution_of_features(model, tmp_path):
    network = list(layers_of(model))
    device = Device("10.3", write_bundle(tmp_path / "bundle"), network=network)
    assert device.run("build").status == 0
    kept = {layer.state.name for layer in device._layers if hasattr(layer.state, "properties")}
    of_map = {layer.name for layer in network if "anomaly_map_generator" in layer.name}
    in_float = {layer.name for layer in network if layer.dtype == "FLOAT" and layer.kind not in {"CONSTANT", "SHAPE"}}
    assert len(of_map & in_float) > 20
    assert of_map & in_float <= kept
    assert len(kept - of_map) == 1, "all the rest of the head is taking the largest value of the map"
    convolutions = [layer for layer in network if layer.kind in {"CONVOLUTION", "DECONVOLUTION"}]
    assert len(convolutions) >= 30
    assert {layer.name for layer in convolutions} & kept <= {"/model/anomaly_map_generator/Conv"}
