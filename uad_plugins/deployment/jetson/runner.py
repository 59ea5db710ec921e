"""Builds and runs the TensorRT engine of this bundle: ``python3 runner.py build | predict | benchmark``.

Copied into the bundle together with the folder ``uadx_jetson``. Needs Python 3.8 or newer, numpy, Pillow 8 or newer,
TensorRT 8.4 or newer with its Python bindings, and pycuda.
"""

from __future__ import annotations

import sys

from uadx_jetson.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
