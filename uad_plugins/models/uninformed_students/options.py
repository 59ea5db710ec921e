"""Options of Uninformed Students. No torch in here: plugins are listed without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PatchSize = Literal[17, 33, 65]
Stride = Literal[1, 2, 4, 8]

NORMAL, PROCEDURAL = "normal", "procedural"
"""Sources of a teacher's patches besides a folder."""

GLOBAL: Literal["global"] = "global"
BY_CATEGORY: Literal["category"] = "category"
"""What statistics are taken over."""

WIDEST = 4
"""Largest share of the paper's channels."""


class TeacherRecipe(BaseModel):
    """How a teacher is distilled; the defaults are those of section 4.1 of the paper."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: str | None = Field(
        None,
        description="What patches are cropped from: a folder of natural images, 'normal' (the training images), or "
        "'procedural' (drawn images). null: the training images, unless the teacher that ships is taken.",
    )
    layer: Literal[2, 3, 4] = Field(4, description="Layer of the pretrained ResNet whose pooled feature is the target.")
    target_size: int = Field(
        64, ge=0, description="Smaller patches are enlarged to this side for the pretrained network; 0: never."
    )
    steps: int = Field(50_000, gt=0, description="Steps of the distillation.")
    batch_size: int = Field(64, gt=1, description="Patches in a step.")
    lr: float = Field(2e-4, gt=0, description="Learning rate of Adam.")
    weight_decay: float = Field(1e-5, ge=0, description="Weight decay of Adam.")
    knowledge: float = Field(1.0, ge=0, description="Weight of the knowledge distillation loss.")
    metric: float = Field(0.0, ge=0, description="Weight of the metric learning loss.")
    compactness: float = Field(1.0, ge=0, description="Weight of the descriptor compactness loss.")
    margin: float = Field(1.0, gt=0, description="Margin of the metric learning loss.")
    seed: int = Field(0, ge=0, description="Of patches and initial weights.")

    @field_validator("compactness")
    @classmethod
    def _something_to_learn(cls, value: float, info: ValidationInfo) -> float:
        if not value and not any(info.data.get(name, 1.0) for name in ("knowledge", "metric")):
            raise ValueError("one of knowledge, metric and compactness must be above 0")
        return value


class UninformedStudentsOptions(BaseModel):
    """The configuration section ``model.options``."""

    model_config = ConfigDict(extra="forbid")

    patch_sizes: list[PatchSize] = Field([17, 33, 65], min_length=1, description="Scales: sides of the patches.")
    students: int = Field(3, ge=1, description="Students in each ensemble.")
    width: float = Field(1.0, gt=0, le=WIDEST, description="Channels of the hidden layers as a share of the paper's.")
    stride: Stride = Field(1, description="A descriptor for every n-th pixel; 1 is the paper's.")
    train_stride: Stride | None = Field(None, description="The same while training; null: as stride.")
    train_window: int | None = Field(
        None, ge=8, description="Side in pixels of the square that a batch is trained on; null: the whole image."
    )
    statistics: Literal["global", "category"] = Field(GLOBAL, description="Statistics over all, or of each category.")
    teacher: TeacherRecipe = Field(default_factory=TeacherRecipe, description="How teachers are distilled.")

    @field_validator("patch_sizes")
    @classmethod
    def _different(cls, value: Sequence[int]) -> Sequence[int]:
        if len(set(value)) != len(value):
            raise ValueError("each patch size may be given once")
        return value
