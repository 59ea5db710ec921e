"""Files written whole or not at all, their hashes, and the one error type."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


class RunnerError(Exception):
    """Something the user can act on; the message is one line."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits.

    Raises:
        RunnerError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise RunnerError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


def write_atomically(path: Path, content: Any) -> None:
    """Write bytes, or anything with a buffer, to a file that is there whole or not at all, even after a power cut.

    Raises:
        RunnerError: The folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="." + path.name[:32] + ".", suffix=".part", dir=str(path.parent))
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RunnerError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; see ``write_atomically``."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("utf-8"))
