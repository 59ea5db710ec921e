"""Conformance tests for deployment targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import BaseModel

from uad_plugins.deployment.bundle import Bundle, seal
from uad_plugins.deployment.manifest import (
    BundleManifest,
    InputSpec,
    OutputNames,
    PreprocessingSpec,
    ThresholdSet,
    complaint,
)
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.thresholds import Threshold, Thresholds
from uad_plugins.hookspecs import PackagingRequest, PackagingResult, TargetPlugin
from uad_plugins.registry import installed
from uad_plugins.testing.common import Conformance

SIZE = (16, 24)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TargetConformance(Conformance[TargetPlugin]):
    """Checks of a ``TargetPlugin``: what it packages of a small float model is a bundle.

    Attributes:
        plugin: Name of a registered target, or its description.
        options: Given to it, by name.
    """

    kind = "target"
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def packaged(self, tmp_path: Path) -> tuple[Path, PackagingResult]:
        """Package a small model."""
        missing = [item.module for item in self.item.requires if not installed(item.module)]
        if missing or not installed("onnx"):
            pytest.skip(f"not installed: {', '.join(missing) or 'onnx'}")
        folder = tmp_path / "bundle"
        folder.mkdir()
        return folder, self.item.package(_request(tmp_path, folder, self.item.options.model_validate(self.options)))

    def test_its_options_have_defaults_and_descriptions(self) -> None:
        """``--set`` is never needed, and the documentation of each option is in its description."""
        assert issubclass(self.item.options, BaseModel)
        self.item.options()
        for name, about in self.item.options.model_fields.items():
            assert about.description, f"option '{name}' has a description"

    def test_it_writes_files_that_a_bundle_may_hold(self, packaged: tuple[Path, PackagingResult]) -> None:
        """Names are plain and of known kinds, and the models it names are there."""
        folder, result = packaged
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        assert files, "a target writes files into the folder it is given"
        for name in files:
            assert not complaint(name), f"'{name}' {complaint(name)}"
        models = [name for name in (result.onnx, result.openvino) if name is not None]
        assert models, "a target says where its model is: onnx, openvino or both"
        for name in models:
            assert name in files, f"'{name}' is not among the files it wrote"

    def test_it_says_what_the_model_takes_and_gives(self, packaged: tuple[Path, PackagingResult]) -> None:
        """Names of input and outputs, how it is used, and a small good model keeps its rules."""
        _, result = packaged
        assert result.input_name, "the input has a name"
        assert len(set(result.outputs)) == 2, "score and map have names of their own"
        assert result.usage.strip(), "the model card says how it is used"
        assert not [case for cases in result.checks.values() for case in cases], f"rules are kept: {result.checks}"

    def test_what_it_packages_is_a_bundle(self, packaged: tuple[Path, PackagingResult]) -> None:
        """Sealed, it is opened and verified."""
        folder, result = packaged
        seal(folder, _manifest(self.item.name, result))
        assert Bundle.open(folder).manifest.target == self.item.name

    def test_it_refuses_a_source_without_models(self, tmp_path: Path) -> None:
        """What cannot be packaged is a ``UadxError``, not a crash."""
        folder = tmp_path / "bundle"
        folder.mkdir()
        request = _request(tmp_path, folder, self.item.options.model_validate(self.options))
        with pytest.raises(UadxError):
            self.item.package(PackagingRequest(**{**vars(request), "models": {}}))


def _request(work: Path, folder: Path, options: BaseModel) -> PackagingRequest:
    return PackagingRequest(
        models=_models(work), image_size=SIZE, mean=MEAN, std=STD, precision="fp32", profile="float", whole=False,
        options=options, folder=folder,
    )  # fmt: skip


def _models(work: Path) -> dict[str, Path]:
    """Write a model of one convolution: the map is what it gives, the score its largest value."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    height, width = SIZE
    weight = numpy_helper.from_array(np.full((1, 3, 1, 1), 0.5, np.float32), "weight")
    shape = numpy_helper.from_array(np.array([1, height, width], np.int64), "shape")
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["features"]),
        helper.make_node("Reshape", ["features", "shape"], ["anomaly_map"]),
        helper.make_node("ReduceMax", ["features"], ["largest"], keepdims=0),
        helper.make_node("Reshape", ["largest", "one"], ["score"]),
    ]
    given = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, height, width])
    wanted = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, [1, height, width]),
    ]
    graph = helper.make_graph(nodes, "small", [given], wanted, [weight, shape, one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, work / "model.onnx")
    found = {"onnx": work / "model.onnx"}
    if installed("openvino"):
        import openvino

        openvino.save_model(openvino.convert_model(work / "model.onnx"), work / "model.xml", compress_to_fp16=False)
        found["openvino"] = work / "model.xml"
    return found


def _manifest(target: str, result: PackagingResult) -> BundleManifest:
    height, width = SIZE
    return BundleManifest(
        target=target,
        model="small",
        categories=["thing"],
        precision="fp32",
        onnx=result.onnx,
        openvino=result.openvino,
        input=InputSpec(
            name=result.input_name,
            shape=(1, height, width, 3) if result.pixels else (1, 3, height, width),
            dtype="uint8" if result.pixels else "float32",
            layout="NHWC" if result.pixels else "NCHW",
        ),
        outputs=OutputNames(score=result.outputs[0], map=result.outputs[1]),
        preprocessing=PreprocessingSpec(mean=MEAN, std=STD, normalised_by="graph" if result.pixels else "caller"),
        score={"normalisation": "none"},
        thresholds=ThresholdSet.of(Thresholds(Threshold(1.0, "quantile", 10))),
        files={},
    )
