"""Options of the built-in targets. Nothing heavy in here: checking ``--set`` and the documentation look at it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class OvmsOptions(BaseModel):
    """Options of ``ovms``."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("uadx", pattern=NAME, description="What clients call the model.")
    device: str = Field("CPU", description="OpenVINO device: CPU, GPU, AUTO.")


class TritonOptions(BaseModel):
    """Options of ``triton``."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("uadx", pattern=NAME, description="What clients call the model.")
    backend: Literal["auto", "onnxruntime", "openvino"] = Field(
        "auto", description="What executes it; auto: onnxruntime where there is an ONNX model."
    )
    kind: Literal["KIND_AUTO", "KIND_CPU", "KIND_GPU"] = Field("KIND_AUTO", description="Where instances run.")
    count: int = Field(1, ge=1, description="Instances.")
