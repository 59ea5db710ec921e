"""Conformance tests for plugins: subclass the class of your kind in a pytest module, set ``plugin``, inherit the checks.

::

    from uad_plugins.testing import LayoutConformance

    class TestDated(LayoutConformance):
        plugin = "dated"
        files = ("bolt/2026-01-05/ok/1.png", "bolt/2026-01-06/ok/1.png", "bolt/2026-01-06/nok/1.png")

``plugin`` is a registered name or the description itself. Needs pytest, which nothing else in the package does;
``ModelConformance`` and ``QuantizerConformance`` alone need torch and anomalib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

# The checks are asserts outside a test module: without this their failures would not show the values.
pytest.register_assert_rewrite(
    "uad_plugins.testing.common",
    "uad_plugins.testing.layouts",
    "uad_plugins.testing.models",
    "uad_plugins.testing.quantizers",
    "uad_plugins.testing.runtimes",
    "uad_plugins.testing.targets",
)

from uad_plugins.testing.common import Conformance  # noqa: E402
from uad_plugins.testing.layouts import LayoutConformance  # noqa: E402
from uad_plugins.testing.runtimes import RuntimeConformance  # noqa: E402
from uad_plugins.testing.targets import TargetConformance  # noqa: E402

if TYPE_CHECKING:
    from uad_plugins.testing.models import ModelConformance
    from uad_plugins.testing.quantizers import QuantizerConformance

__all__ = [
    "Conformance",
    "LayoutConformance",
    "ModelConformance",
    "QuantizerConformance",
    "RuntimeConformance",
    "TargetConformance",
]


def __getattr__(name: str) -> Any:
    # A layout is tested in a second, and without torch.
    if name == "ModelConformance":
        from uad_plugins.testing.models import ModelConformance

        return ModelConformance
    if name == "QuantizerConformance":
        from uad_plugins.testing.quantizers import QuantizerConformance

        return QuantizerConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
