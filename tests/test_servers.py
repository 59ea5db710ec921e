"""Bundles for model servers: what is written keeps the schemas that the servers publish."""

import json
import sys
from typing import ClassVar

import pytest
from google.protobuf import text_format
from server_schemas import ENUMS, OVMS, OVMS_MODEL, against_schema, triton_config

from uad_plugins.deployment.servers import check_ovms, check_triton, pbtxt, read_pbtxt
from uad_plugins.errors import UadxError
from uad_plugins.testing import TargetConformance


class TestOvms(TargetConformance):
    plugin = "ovms"
    options: ClassVar = {"name": "line-3"}

    def test_its_configuration_keeps_the_published_schema(self, packaged):
        (entry,) = published(packaged)["model_config_list"]
        assert entry["config"]["name"] == "line-3"


class TestTriton(TargetConformance):
    plugin = "triton"

    def test_its_configuration_keeps_the_published_schema(self, packaged):
        assert published(packaged).backend == "onnxruntime"


class TestTritonWithOpenVino(TargetConformance):
    plugin = "triton"
    options: ClassVar = {"backend": "openvino", "kind": "KIND_CPU", "count": 2}

    def test_its_configuration_keeps_the_published_schema(self, packaged):
        (group,) = published(packaged).instance_group
        assert (group.kind, group.count) == (ENUMS["Kind"].index("KIND_CPU"), 2)


def test_triton_with_openvino_says_how_to_install_it(uadx, trained, tmp_path, monkeypatch):
    for name in ("uad_plugins.runtime.openvino_detector", "uad_plugins.runtime.graph"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    status, _, err = uadx("deploy", trained, "--target", "triton", "--set", "backend=openvino", "--out", tmp_path / "b")
    assert status == 1
    assert "triton with backend=openvino needs openvino, which is not installed" in err
    assert "pip install 'uadx[openvino]'" in err
    assert list(tmp_path.iterdir()) == []


def published(packaged):
    """Hold the configuration that a target has written to what the server publishes; returns it."""
    folder, result = packaged
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        assert against_schema(config, OVMS) == []
        return config
    (path,) = folder.rglob("config.pbtxt")
    config = triton_config(path.read_text())
    # Triton asks for these, though proto3 requires nothing: the name is the folder's, every tensor has a shape.
    assert config.name == path.parent.name
    assert [tensor.name for tensor in config.input] == [result.input_name]
    assert [tensor.name for tensor in config.output] == list(result.outputs)
    assert all(tensor.dims for tensor in [*config.input, *config.output])
    assert (path.parent / "1" / ("model.xml" if config.backend == "openvino" else "model.onnx")).is_file()
    return config


def test_the_published_schemas_refuse_what_is_not_in_them():
    """A check that takes everything would be none."""
    good = {"model_config_list": [{"config": {"name": "a", "base_path": "a", "nireq": 2}}]}
    assert against_schema(good, OVMS) == []
    model = {"name": 1, "shap": "auto", "nireq": -1, "batch_size": 1.5, "plugin_config": {"a": []}}
    assert len(against_schema({"model_config_list": [{"config": model}, {"conf": {}}], "x": 1}, OVMS)) == 9
    for text in (
        'nam: "a"',
        "name: 3",
        'max_batch_size: "a"',
        "input { data_type: TYPE_FLOAT }",
        "instance_group { kind: KIND_TPU }",
        "input { dims: [ 1.5 ] }",
    ):
        with pytest.raises(text_format.ParseError):
            triton_config(text)


def test_the_rules_of_deploy_are_the_published_ones():
    from uad_plugins.deployment.servers import OVMS_KEYS, TRITON_KINDS, TRITON_TYPES

    assert set(OVMS_KEYS) <= set(OVMS_MODEL["properties"])
    for key, kinds in OVMS_KEYS.items():
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            assert against_schema({"name": "a", "base_path": "a", key: kind()}, OVMS_MODEL) == [], key
    assert set(ENUMS["DataType"]) - {"TYPE_INVALID"} == TRITON_TYPES
    assert set(ENUMS["Kind"]) == TRITON_KINDS


def test_wrong_server_configurations_are_found():
    good = {"model_config_list": [{"config": {"name": "a", "base_path": "a", "nireq": 2}}]}
    assert check_ovms(good) == []
    assert check_ovms({}) == ["model_config_list is not a list of models"]
    wrong = {"model_config_list": [{"config": {"name": "a", "nireq": "two", "colour": 1}}, {"conf": {}}], "x": 1}
    assert len(check_ovms(wrong)) == 5

    config = {
        "name": "a",
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": [{"name": "i", "data_type": "TYPE_FP32", "dims": [1, 3]}],
        "output": [{"name": 'a "quoted" \\ name', "data_type": "TYPE_FP32", "dims": [1]}],
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
    }
    assert read_pbtxt(pbtxt(config)) == config
    assert check_triton(config) == []
    bad = {**config, "backend": "caffe", "max_batch_size": -1, "input": [], "colour": 1, "name": ""}
    bad["output"] = [{"data_type": "TYPE_FLOAT", "dims": [0], "colour": 1}]
    bad["instance_group"] = [{"kind": "KIND_TPU", "count": 0}]
    assert len(check_triton(bad)) == 11
    with pytest.raises(UadxError, match="unexpected"):
        read_pbtxt("name } 3")
