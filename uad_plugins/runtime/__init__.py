"""Runs bundles without torch: ``from uad_plugins.runtime import Detector``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uad_plugins.runtime.bundle_detector import Detector, Result

__all__ = ["Detector", "Result"]


def __getattr__(name: str) -> Any:
    # The engines of this package are registered by name alone: listing them must load nothing.
    if name in __all__:
        from uad_plugins.runtime import bundle_detector

        return getattr(bundle_detector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
