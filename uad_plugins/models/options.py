"""Options of the distillation methods, read without torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

ANOMALY_WEIGHT = 3.0
"""Weight of the distance that STFPM's student keeps from its teacher on synthetic anomalies, beside that of following it."""

Filling = Literal["noise", "discolour", "blur", "misplace", "foreign"]

FILLINGS: tuple[Filling, ...] = get_args(Filling)

SOFT_EDGES = 0.5
"""Share of the synthetic anomalies whose edges fade."""

Weight = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]

Part = Annotated[float, Field(ge=0, lt=1, strict=True)]
"""A share that leaves something over."""


class SyntheticAnomalyOptions(BaseModel):
    """Training on images into which synthetic anomalies are drawn."""

    model_config = ConfigDict(extra="forbid")

    synthetic_anomalies: float = Field(
        0.0,
        ge=0,
        le=1,
        strict=True,
        description="Share of the training images that get a synthetic anomaly; 0 is the published recipe.",
    )
    anomaly_fillings: list[Filling] = Field(
        list(FILLINGS),
        min_length=1,
        description="What anomalies are filled with, each as often: noise; the part's surface in another tone, blurred, or "
        "of another place; a piece of another image.",
    )
    anomaly_soft_edges: float = Field(
        SOFT_EDGES, ge=0, le=1, strict=True, description="Share of the anomalies whose edges fade; the others' are sharp."
    )
    specialists: str | None = Field(
        None,
        min_length=1,
        description="Folder of runs of single products, whose students teach this one; needs synthetic_anomalies.",
    )
    conditional_norm: bool = Field(
        False,
        strict=True,
        description="Whether the student knows which product it sees: the teacher's features of the whole image say it, and "
        "that scales and shifts the student's channels (conditional batch normalization).",
    )
    products_apart: bool = Field(
        False,
        strict=True,
        description="Whether each product of a batch is learnt as if it were alone: normalised by mean and variance of its "
        "own (domain-specific batch normalization), mined by itself, spoilt by pieces of its own; needs conditional_norm.",
    )


class StfpmOptions(SyntheticAnomalyOptions):
    """Options of STFPM."""

    student_backbone: str | None = Field(
        None,
        min_length=1,
        description="The student's, where it is not the teacher's: a timm ResNet whose features have the same shapes. "
        "Squeeze-and-excitation (seresnet18 for resnet18) lets it see which product it looks at.",
    )
    anomaly_weight: Weight = Field(
        ANOMALY_WEIGHT, description="Weight of the distance from the teacher that the student keeps on synthetic anomalies."
    )


class ReverseDistillationOptions(SyntheticAnomalyOptions):
    """Options of Reverse Distillation."""

    anomaly_map_mode: str = Field("add", pattern="^(add|multiply)$", description="How the maps of the layers are combined.")
    anomaly_weight: Weight | None = Field(
        None,
        description="Weight of the distance that the decoder keeps on synthetic anomalies; null: it restores the good part.",
    )
    bottleneck_dropout: Part = Field(
        0.0,
        description="Share of the bottleneck's values that the decoder does without in training; 0 is the published recipe.",
    )
    hard_mining: Part = Field(
        0.0,
        description="Share of the places, those restored best, that count a tenth of the others; 0 is the published recipe.",
    )
