"""Does a bundle say what its source says: on a few images, with every engine that is installed here. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uad_plugins.data.samples import SampleTable
from uad_plugins.detector import Detector
from uad_plugins.errors import EngineError, UadxError, reason_of
from uad_plugins.hookspecs import RuntimePlugin
from uad_plugins.quantization.referee import AGAINST_FP32, ENGINES, Limits, compare, held_out
from uad_plugins.registry import installed, registry

IMAGES = 6
BUILDS_FIRST = frozenset({"tensorrt"})
"""Engines that build for minutes before they run: the device does that."""


def images_for(table: SampleTable | None, categories: Sequence[str], size: tuple[int, int]) -> tuple[list[Any], str]:
    """Return what to verify on, and in words what it is.

    Args:
        table: The data, where it can be reached.
        categories: Of the model.
        size: ``(height, width)`` of its input.

    Returns:
        Paths of held-out normal images; without any, random images of several sizes.
    """
    if table is not None:
        try:
            return list(held_out(table, categories, IMAGES)), "held-out images"
        except UadxError:
            # Other products, or no image held out: anything will do to compare two detectors.
            pass
    return list(random_images(size, IMAGES)), "random images"


def random_images(size: tuple[int, int], count: int) -> list[NDArray[np.uint8]]:
    """Return smooth random images, uint8 ``(H, W, 3)``: the same each time, of sizes around the given one."""
    rng, found = np.random.default_rng(0), []
    for index in range(count):
        height, width = (max(8, round(side * (0.75 + 0.25 * index))) for side in size)
        coarse = rng.uniform(0, 255, (height // 8 + 2, width // 8 + 2, 3))
        smooth = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
        found.append(np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))
    return found


def verify(
    bundle: Path, reference: Detector, precision: str, images: Sequence[Any], tell: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Compare a bundle with its source.

    Args:
        bundle: Its folder.
        reference: The source's detector.
        precision: Of the bundle.
        images: Paths or arrays.
        tell: Called with a line about each engine that is installed and declines.

    Returns:
        Agreement by engine.

    Raises:
        UadxError: They disagree, or no engine here can run the bundle.
    """
    found: dict[str, dict[str, Any]] = {}
    declined: list[str] = []
    plugins: list[RuntimePlugin] = registry().items("runtime")
    for plugin in plugins:
        if plugin.name in BUILDS_FIRST or not all(installed(item.module) for item in plugin.requires):
            continue
        try:
            candidate = plugin.open(bundle)
        except EngineError as error:
            declined.append(error.message)
            continue
        except UadxError:
            raise
        except Exception as error:
            # An engine may be foreign code: another may do.
            declined.append(f"{plugin.name}: {type(error).__name__}: {reason_of(error)}")
            continue
        if candidate is None:
            continue
        with candidate:
            agreement = compare(reference, candidate, images)
        wrong = agreement.wrong(_limits(reference.engine, candidate.engine, precision))
        if wrong:
            raise UadxError(
                f"the bundle does not say what its source says: {candidate.engine}: {'; '.join(wrong)}",
                "nothing was written; please report it with the source",
            )
        found[candidate.engine] = agreement.as_dict()
    for reason in declined if found else ():
        tell(f"warning: {reason}; the bundle is verified without it")
    if not found:
        why = f": {'; '.join(declined)}" if declined else ""
        raise UadxError(
            f"no engine on this machine can run the bundle to verify it{why}", "pip install 'uadx[openvino-runtime]'"
        )
    return found


def _limits(reference: str, candidate: str, precision: str) -> Limits:
    """Return what is agreement: engines round INT8 differently, FP16 weights are rounded once, floats are floats."""
    if precision == "int8":
        return ENGINES
    return AGAINST_FP32[precision if reference == "torch" else "fp32"]
