"""One error type for everything a user can put right, and the near-name search behind its hints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UadxError(Exception):
    """A failure that the user can act on: one line that says what is wrong, and a hint that says what to do.

    Args:
        message: What is wrong, in one line.
        hint: What to do about it, in one line; may be empty.
        exit_code: Exit status of the command line: 1 for a failure, 2 for wrong usage.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class EngineError(UadxError):
    """An engine that is installed and cannot be used on this machine: another may do."""


class UsageError(UadxError):
    """The command, a flag or a configuration key was used wrongly (exit status 2)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, exit_code=2)


def reason_of(error: BaseException) -> str:
    """Return the first line of what an exception says, or its kind when it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like ``name``, or None when nothing is close."""
    candidates = list(known)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if close:
        return close[0]
    return next((candidate for candidate in candidates if name.lower() in candidate.lower()), None)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Build the error for a name that does not exist: what exists, and the nearest one."""
    names = sorted(known)
    close = nearest(name, names)
    hint = f"did you mean '{close}'? " if close else ""
    listing = ", ".join(names) if names else "none"
    return UsageError(f"unknown {kind} '{name}'", f"{hint}known: {listing}")


def missing_extra(feature: str, extra: str, cause: ImportError) -> UadxError:
    """Build the error for a feature whose optional dependency is not installed."""
    return UadxError(
        f"{feature} needs a package that is not installed: {cause.name or cause}",
        f"pip install 'uadx[{extra}]'",
    )
