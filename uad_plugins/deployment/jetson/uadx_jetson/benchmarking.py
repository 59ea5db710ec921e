"""How fast the engine is on this device, from an image in memory to its score and map."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import pycuda.driver as cuda

from .bundle import Bundle
from .imaging import Normaliser
from .inference import Session


def benchmark(session: Session, bundle: Bundle, warm_up: int, images: int) -> dict[str, Any]:
    """Measure latency with one image at a time, then throughput with one on each stream.

    Each measurement has preparing the input, both copies and the engine; decoding and resizing are not in it. The input is
    noise: the time of these networks does not depend on what the image shows.

    Args:
        session: The engine.
        bundle: Shape and preprocessing of its input.
        warm_up: Images before the first measurement.
        images: Images of each measurement.

    Returns:
        ``images``, ``latency_ms`` with ``p50``, ``p90``, ``p99`` and ``mean``, ``images_per_s``, and ``memory_mib`` with the
        device's ``device_used`` (on a Jetson that of the whole system, as memory is shared) and ``process_peak``.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (bundle.height, bundle.width, 3)).astype(np.uint8)
    normaliser = Normaliser(bundle)

    def fill(target: Any) -> None:
        normaliser.fill(pixels, target)

    lane = session.lanes[0]
    latencies = []
    for number in range(warm_up + images):
        start = time.perf_counter()
        lane.submit(fill)
        lane.fetch()
        if number >= warm_up:
            latencies.append(1000 * (time.perf_counter() - start))
    lanes = session.lanes
    start = time.perf_counter()
    for number in range(images):
        if number >= len(lanes):
            lanes[number % len(lanes)].fetch()
        lanes[number % len(lanes)].submit(fill)
    for number in range(max(0, images - len(lanes)), images):
        lanes[number % len(lanes)].fetch()
    seconds = time.perf_counter() - start
    p50, p90, p99 = (round(float(value), 3) for value in np.percentile(latencies, (50, 90, 99)))
    free, total = cuda.mem_get_info()
    return {
        "images": images,
        "latency_ms": {"p50": p50, "p90": p90, "p99": p99, "mean": round(float(np.mean(latencies)), 3)},
        "images_per_s": round(images / seconds, 2),
        "memory_mib": {
            "device_used": (total - free) >> 20,
            # Linux counts it in KiB.
            "process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        },
    }
