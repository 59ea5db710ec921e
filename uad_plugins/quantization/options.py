"""Options of the built-in backends. Nothing heavy in here: checking ``--set`` and the documentation look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

OVERFLOW = (
    "Weights of half the range, for CPUs whose 8-bit sums saturate: disable, first_layer or enable; "
    "auto asks the processor of this machine."
)


class Options(BaseModel):
    """Base of all options: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class CalibrationOptions(Options):
    """How a network is made ready for its quantizers, and how their ranges are set."""

    equalize: bool = Field(
        True,
        description="Make the channels between two convolutions alike first, by the images that calibrate; what is computed "
        "stays the same.",
    )
    bias_correction: Literal["fast", "full"] = Field(
        "full",
        description="Correct the bias of each layer with all before it corrected (full), or of each by itself (fast).",
    )
    ranges: Literal["quantile", "whole", "mean"] | None = Field(
        None,
        description="Range of an activation: all that calibration shows (whole), that without the outermost values of each "
        "sample (quantile), or NNCF's mean over samples, which clips the rest; null: quantile, whole for noise.",
    )

    def chosen_ranges(self, images: bool) -> str:
        """Return how ranges are set. Noise reaches less far in the layers than images do: all of it is needed.

        Args:
            images: Whether there are images among the calibration data.
        """
        return self.ranges or ("quantile" if images else "whole")


class OpenvinoOptions(CalibrationOptions):
    """Options of ``openvino-int8``."""

    overflow_fix: Literal["auto", "disable", "first_layer", "enable"] = Field("auto", description=OVERFLOW)
    max_drop: float | None = Field(
        None, gt=0, lt=1, description="Leave layers in float until no category loses more than this; null: quantize all."
    )
    max_layers: PositiveInt | None = Field(
        None, description="Most layers left in float (max_drop); null: as many as it takes."
    )


class TensorrtOptions(CalibrationOptions):
    """Options of ``tensorrt-int8``."""

    weights: Literal["float32", "int8"] = Field(
        "float32",
        description="How weights are stored: float32 (every TensorRT) or int8 (a quarter of the size, TensorRT 10).",
    )
    source: Path | None = Field(
        None, description="Result of nncf-qat with profile tensorrt to export; null: calibrate the run."
    )


class QatOptions(CalibrationOptions):
    """Options of ``nncf-qat``."""

    loss: Literal["maps", "distillation"] = Field(
        "maps",
        description="What is learnt: the maps of FP32, or, distillation, to follow the quantized teacher closer still.",
    )
    epochs: PositiveInt = Field(5, description="Passes over the training images.")
    lr: PositiveFloat = Field(1e-5, description="Learning rate of the student's weights (Adam) at its highest.")
    scale_lr: PositiveFloat = Field(
        1e-3, description="Learning rate of the quantizers' scales, as a share of each scale a step."
    )
    weight_decay: float = Field(0.0, ge=0, description="Of the weights; scales have none.")
    scope: Literal["all", "student"] = Field(
        "all", description="What is quantized: the whole network, or the student alone."
    )
    profile: Literal["openvino", "tensorrt"] = Field("openvino", description="Rules that the graph follows.")
    freeze_batchnorm: bool = Field(
        True, description="Keep the running statistics of BatchNorm; false lets the student's move, but for the last epoch."
    )
    overflow_fix: Literal["auto", "disable", "first_layer", "enable"] = Field("auto", description=OVERFLOW)
    batch_size: PositiveInt | None = Field(None, description="Images in a batch; null: as in the run.")
    weights: Literal["float32", "int8"] | None = Field(
        None, description="How ONNX weights are stored; null: int8 for openvino, float32 for tensorrt."
    )
    accelerator: str = Field("auto", description="Lightning's accelerator: auto, cpu or gpu.")
