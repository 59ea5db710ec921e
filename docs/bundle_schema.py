"""Writes ``docs/bundle.schema.json`` from the manifest's classes. ``--check`` only compares."""

import sys
from pathlib import Path

from uad_plugins.deployment.manifest import json_schema

PAGE = Path(__file__).parent / "bundle.schema.json"

if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == json_schema() else "docs/bundle.schema.json is not current: make docs")
    PAGE.write_text(json_schema())
