"""The Python interface of a bundle: an image in; score, threshold, verdict and map out. No torch in here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uad_plugins.detector import Prediction, decode, open_detector
from uad_plugins.errors import unknown_name
from uad_plugins.evaluation.rows import ERROR, plain_threshold, verdict
from uad_plugins.imaging import ImageError

ImageSource = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Result:
    """What was found in one image.

    Attributes:
        score: Higher is more anomalous, not bounded above; NaN when the image could not be read or scored.
        threshold: Scores above it are anomalous; None where none was set.
        verdict: ``normal``, ``anomalous``, ``error``, or ``no threshold`` where none was set.
        map: Anomaly of each pixel, float32 ``(H, W)`` at the network's input size; None with an error.
        size: ``(height, width)`` of the source image, upright.
        error: Why there is no score; empty when there is one.
    """

    score: float
    threshold: float | None
    verdict: str
    map: NDArray[np.float32] | None
    size: tuple[int, int]
    error: str = ""


class Detector:
    """Runs a bundle, a quantized model or a run.

    Args:
        bundle: Folder or ``.zip`` file; it is verified first.
        engine: ``openvino``, ``onnxruntime``, ``tensorrt``, or a plugin's; None takes the best that is installed.

    Attributes:
        categories: Products it was trained on.
        image_size: ``(height, width)`` that images are resized to.
        thresholds: Decision thresholds.
        engine: What executes it.

    Not to be used by two threads at a time.

    Raises:
        UadxError: It is damaged or no bundle, or no engine for it is installed.
        UsageError: Unknown engine.
    """

    def __init__(self, bundle: str | Path, engine: str | None = None) -> None:
        self._detector = open_detector(bundle, engine)
        self.categories = self._detector.categories
        self.image_size = self._detector.image_size
        self.thresholds = self._detector.thresholds
        self.engine = self._detector.engine

    def predict(self, image: ImageSource, category: str | None = None) -> Result:
        """Score one image, as fast as one image can be.

        Args:
            image: Image file, Pillow image, or uint8 array ``(H, W, 3)`` in RGB order or ``(H, W)`` in grey, of any size.
            category: The product shown, for its own threshold; None takes the pooled one.

        Raises:
            ImageError: The image cannot be read.
            UsageError: The bundle does not know the category.
        """
        self._check(category)
        item = decode(cast(str, image), self.image_size)
        if item.pixels is None:
            raise ImageError(f"{image}: {item.error}" if isinstance(image, (str, os.PathLike)) else item.error)
        if self._detector.by_category:
            scores, maps = self._detector.infer_by_category(item.pixels[None], [category])
        else:
            scores, maps = self._detector.infer(item.pixels[None])
        return self._result(Prediction("", float(scores[0]), maps[0], item.size), category)

    def stream(self, images: Iterable[ImageSource], category: str | None = None) -> Iterator[Result]:
        """Score many images, as many a second as possible: decoding, resizing and inference overlap.

        Args:
            images: As for ``predict``; taken as they are needed, a few dozen ahead.
            category: The product shown in all of them.

        Yields:
            A result for each image, in order; one that cannot be read gives a result with its error.

        Raises:
            UsageError: The bundle does not know the category.
        """
        self._check(category)
        for found in self._detector.stream(cast(Any, images), categories=repeat(category)):
            yield self._result(found, category)

    def close(self) -> None:
        """Give resources back."""
        self._detector.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check(self, category: str | None) -> None:
        if category is not None and category not in self.categories:
            raise unknown_name("category", category, self.categories)

    def _result(self, found: Prediction, category: str | None) -> Result:
        threshold = self.thresholds.of(category)
        return Result(
            found.score,
            plain_threshold(threshold),
            ERROR if found.failure else verdict(found.score, threshold),
            None if found.failure else found.anomaly_map,
            found.size,
            found.failure,
        )
