"""Methods that can be trained: anomalib's STFPM and Reverse Distillation, Uninformed Students, and any other of anomalib's.

The classes here can be named by class path wherever anomalib takes a model: ``uad_plugins.models.Stfpm``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uad_plugins.models.reverse_distillation import ReverseDistillation
    from uad_plugins.models.stfpm import Stfpm
    from uad_plugins.models.uninformed_students.lightning_model import UninformedStudents

__all__ = ["ReverseDistillation", "Stfpm", "UninformedStudents"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: this package is also imported to list plugins, which must not load torch.
    if name == "Stfpm":
        from uad_plugins.models.stfpm import Stfpm

        return Stfpm
    if name == "ReverseDistillation":
        from uad_plugins.models.reverse_distillation import ReverseDistillation

        return ReverseDistillation
    if name == "UninformedStudents":
        from uad_plugins.models.uninformed_students.lightning_model import UninformedStudents

        return UninformedStudents
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
