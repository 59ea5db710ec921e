"""What the processor offers: cores, and instructions for INT8 arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
ACCUMULATING = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})
"""Instructions that add products of 8-bit numbers in 32 bits; older ones saturate at 16."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_flags() -> list[str]:
    """Return the vector instructions that matter to INT8; empty where the system does not say (it is asked on Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((set(value.split()) for name, _, value in lines if name.strip() in {"flags", "Features"}), set())
    return [flag for flag in FLAGS if flag in flags]


def saturates() -> bool:
    """Tell whether sums of 8-bit products may overflow on this processor, as far as is known."""
    return not ACCUMULATING & set(cpu_flags())
