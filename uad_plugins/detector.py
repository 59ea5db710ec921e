"""One interface for a run, a quantized model and a bundle: images in, score and map out. No torch in here."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from uad_plugins.cpu import cores
from uad_plugins.errors import EngineError, UadxError, reason_of
from uad_plugins.evaluation.thresholds import Thresholds
from uad_plugins.hookspecs import RuntimePlugin
from uad_plugins.imaging import ImageError, RgbImage, resize_rgb, to_8_bit
from uad_plugins.registry import registry

BATCH_SIZE = 16
"""Images scored together, or decoded ahead."""

READERS = min(4, cores())
"""Threads that decode: more than there are cores would only take turns with inference."""


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        path: The image file.
        score: Anomaly score, unbounded above, higher is more anomalous; NaN when the image could not be read.
        anomaly_map: float32 ``(H, W)`` at the network's input size; None when the image could not be read.
        size: ``(height, width)`` of the source image, upright.
        error: Why the image could not be read; empty when it could.
    """

    path: str
    score: float
    anomaly_map: NDArray[np.float32] | None
    size: tuple[int, int]
    error: str = ""

    @property
    def failure(self) -> str:
        """Why there is no usable score; empty when there is one."""
        return self.error or ("" if math.isfinite(self.score) else "the model's score is not a finite number")


class Detector(ABC):
    """Something that scores images.

    Attributes:
        name: Where it came from, for messages.
        engine: What executes it.
        categories: Products it was trained on.
        image_size: ``(height, width)`` that images are resized to.
        thresholds: Decision thresholds.
        by_category: Whether scoring takes the category of each image (see ``infer_by_category``).
    """

    by_category: bool = False
    name: str
    engine: str
    categories: list[str]
    image_size: tuple[int, int]
    thresholds: Thresholds

    @abstractmethod
    def infer(self, images: RgbImage) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score a batch.

        Args:
            images: uint8 ``(N, H, W, 3)`` at ``image_size``.

        Returns:
            Scores ``(N,)`` and anomaly maps ``(N, H, W)``, float32.
        """

    def infer_by_category(
        self, images: RgbImage, categories: Sequence[str | None]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score a batch as ``infer`` does, knowing what is shown; called where ``by_category`` is true.

        Args:
            images: uint8 ``(N, H, W, 3)`` at ``image_size``.
            categories: Product shown in each; None where it is not known.

        Raises:
            UadxError: A category is needed and not known.
        """
        del categories
        return self.infer(images)

    def close(self) -> None:
        """Give resources back; the detector cannot be used afterwards."""
        for pool in self._pools().values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _pools(self) -> dict[int, ThreadPoolExecutor]:
        pools: dict[int, ThreadPoolExecutor] = self.__dict__.setdefault("_decoding", {})
        return pools

    def decoders(self, readers: int) -> ThreadPoolExecutor:
        """Return that many decoding threads; they are kept, so that a short stream need not start any."""
        pools = self._pools()
        if readers not in pools:
            pools[readers] = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="uadx-decoder")
        return pools[readers]

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def stream(
        self,
        paths: Iterable[str],
        *,
        categories: Iterable[str | None] | None = None,
        batch_size: int = BATCH_SIZE,
        readers: int = READERS,
    ) -> Iterator[Prediction]:
        """Score images in the order given; the next are decoded while the current ones are scored.

        Memory is bounded: at most three batches of decoded images exist at a time. An image that cannot be read gives a
        prediction with its ``error``.

        Args:
            paths: Image files.
            categories: Product shown in each, where known.
            batch_size: Images scored together.
            readers: Decoding threads.
        """
        remaining = zip(paths, categories if categories is not None else repeat(None), strict=False)
        pool = self.decoders(readers)

        def submit(path: str, category: str | None) -> tuple[str, str | None, Future[Decoded]]:
            return path, category, pool.submit(decode, path, self.image_size)

        waiting: list[tuple[str, str | None, Future[Decoded]]] = []
        try:
            waiting += [submit(*item) for item in islice(remaining, 2 * batch_size)]
            while waiting:
                batch, waiting = waiting[:batch_size], waiting[batch_size:]
                decoded = [(path, category, future.result()) for path, category, future in batch]
                waiting += [submit(*item) for item in islice(remaining, batch_size)]
                yield from self._score(decoded)
        finally:
            for _, _, future in waiting:
                future.cancel()

    def _score(self, decoded: Sequence[tuple[str, str | None, Decoded]]) -> Iterator[Prediction]:
        good = [item.pixels for _, _, item in decoded if item.pixels is not None]
        scores, maps = np.empty(0, np.float32), np.empty((0, 0, 0), np.float32)
        if good and self.by_category:
            known = [category for _, category, item in decoded if item.pixels is not None]
            scores, maps = self.infer_by_category(np.stack(good), known)
        elif good:
            scores, maps = self.infer(np.stack(good))
        position = 0
        for path, _, item in decoded:
            if item.pixels is None:
                yield Prediction(path, float("nan"), None, (0, 0), item.error)
            else:
                yield Prediction(path, float(scores[position]), maps[position], item.size)
                position += 1


@dataclass(frozen=True)
class Decoded:
    """An image made ready for a network.

    Attributes:
        pixels: uint8 ``(H, W, 3)`` at the network's input size; None when it could not be read.
        size: ``(height, width)`` of the source image, upright.
        error: Why it could not be read.
    """

    pixels: RgbImage | None
    size: tuple[int, int] = (0, 0)
    error: str = ""


def decode(path: str, size: tuple[int, int]) -> Decoded:
    """Decode and resize an image; one that cannot be read is an answer too.

    Args:
        path: Image file, or whatever else ``imaging.to_8_bit`` takes.
        size: ``(height, width)`` to resize to.
    """
    try:
        image = to_8_bit(path)
        return Decoded(resize_rgb(image, size), (image.height, image.width))
    except ImageError as error:
        return Decoded(None, error=error.message.removeprefix(f"{path}: "))


def _preferred(runtime: RuntimePlugin, folder: Path) -> bool:
    """Tell whether an engine wants to be asked first; one that fails at that is asked in its turn."""
    with suppress(Exception):
        return runtime.preferred is not None and runtime.preferred(folder)
    return False


def open_detector(folder: str | Path, engine: str | None = None) -> Detector:
    """Open a run, a quantized model or a bundle.

    Args:
        folder: The station's folder, or the file of a zipped bundle.
        engine: Name of a runtime plugin; None takes the first that knows this kind of folder.

    Raises:
        UadxError: There is no such folder, no engine takes it, or the only one that does cannot be used here.
        UsageError: Unknown engine.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise UadxError(f"{folder}: no such file or folder", "give the folder that 'uadx train --out' wrote")
    runtimes = [registry().get("runtime", engine)] if engine else registry().items("runtime")
    answers: list[str] = []
    missing: list[str] = []
    failed: list[UadxError] = []
    for runtime in sorted(runtimes, key=lambda item: (not _preferred(item, folder), -item.priority)):
        try:
            detector: Detector | None = runtime.open(folder)
        except EngineError as error:
            failed.append(error)
            continue
        except UadxError:
            raise
        except ModuleNotFoundError as error:
            answers.append(f"{runtime.name}: {error}")
            missing += [item.install for item in runtime.requires if item.module == (error.name or "").partition(".")[0]]
            continue
        except Exception as error:
            # An engine may be foreign code: the others must still be asked.
            failed.append(UadxError(f"{folder}: {runtime.name}: {type(error).__name__}: {reason_of(error)}"))
            continue
        if detector is not None:
            for failure in failed:
                warnings.warn(f"{failure.message}; going on with {detector.engine}", RuntimeWarning, stacklevel=2)
            return detector
        answers.append(runtime.name)
    if failed:
        installs = " or ".join(dict.fromkeys(missing))
        raise type(failed[0])(failed[0].message, installs or failed[0].hint)
    if missing:
        which = f"the engine '{engine}'" if engine else "an engine for it"
        raise UadxError(f"{folder}: {which} is not installed", " or ".join(dict.fromkeys(missing)))
    if engine:
        raise UadxError(f"{folder}: the engine '{engine}' does not run it", "leave --engine out: the one that does is found")
    raise UadxError(f"{folder}: not a run, a quantized model or a bundle", f"engines asked: {', '.join(answers)}")
