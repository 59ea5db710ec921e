"""The layout passes the checks of uadx, and splits by date."""

from pathlib import Path

from uad_plugins.registry import registry
from uad_plugins.testing import LayoutConformance


class TestDated(LayoutConformance):
    """Inherits every check of a layout."""

    plugin = "dated"
    files = (
        "bolt/2026-01-05/ok/0001.png",
        "bolt/2026-01-05/ok/0002.png",
        "bolt/2026-01-05/nok/0003.png",
        "bolt/2026-01-06/ok/0001.png",
        "bolt/2026-01-06/nok/0002.png",
        "nut/2025-12-31/ok/0001.png",
        "nut/2026-01-01/ok/0001.png",
        "nut/2026-13-01/ok/0001.png",
    )

    def test_the_last_day_is_tested_on(self, tmp_path: Path) -> None:
        """Good images of earlier days train; a folder that is no day is left out."""
        self.make_example(tmp_path)
        samples = registry().get("layout", "dated").scan(tmp_path)
        assert sorted((Path(s.path).relative_to(tmp_path).as_posix(), s.label, s.split) for s in samples) == [
            ("bolt/2026-01-05/nok/0003.png", 1, "test"),
            ("bolt/2026-01-05/ok/0001.png", 0, "train"),
            ("bolt/2026-01-05/ok/0002.png", 0, "train"),
            ("bolt/2026-01-06/nok/0002.png", 1, "test"),
            ("bolt/2026-01-06/ok/0001.png", 0, "test"),
            ("nut/2025-12-31/ok/0001.png", 0, "train"),
            ("nut/2026-01-01/ok/0001.png", 0, "test"),
        ]

    def test_a_category_alone_is_read_too(self, tmp_path: Path) -> None:
        """The folder of one category can be given instead of the folder above it."""
        self.make_example(tmp_path)
        layout = registry().get("layout", "dated")
        assert layout.recognise(tmp_path / "nut") == 1
        assert {sample.category for sample in layout.scan(tmp_path / "nut")} == {"nut"}
