"""Conformance tests for plugins: subclass the class of your kind in a pytest module, set ``plugin``, inherit the checks.

::

    from uad_plugins.testing import LayoutConformance

    class TestDated(LayoutConformance):
        plugin = "dated"
        files = ("bolt/2026-01-05/ok/1.png", "bolt/2026-01-06/ok/1.png", "bolt/2026-01-06/nok/1.png")

``plugin`` is a registered name or the description itself. Needs pytest, which nothing else in the package does.
"""

from __future__ import annotations

import pytest

# The checks are asserts outside a test module: without this their failures would not show the values.
pytest.register_assert_rewrite(
    "uad_plugins.testing.common",
    "uad_plugins.testing.layouts",
    "uad_plugins.testing.models",
    "uad_plugins.testing.runtimes",
)

from uad_plugins.testing.common import Conformance  # noqa: E402
from uad_plugins.testing.layouts import LayoutConformance  # noqa: E402
from uad_plugins.testing.models import ModelConformance  # noqa: E402
from uad_plugins.testing.runtimes import RuntimeConformance  # noqa: E402

__all__ = ["Conformance", "LayoutConformance", "ModelConformance", "RuntimeConformance"]
