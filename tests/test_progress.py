"""How long work says how far it is."""

import io
import itertools

from uad_plugins import progress


def test_on_a_terminal_the_count_leaves_its_line_when_all_is_done(monkeypatch):
    """What is said next, within the block, is not written behind it."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, clock = Terminal(), itertools.count()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.counting("images") as update:
        update(1, 2)
        assert terminal.getvalue().startswith("\r\x1b[Kimages: 1/2")
        update(2, 2)
        assert terminal.getvalue().endswith("\r\x1b[K")
