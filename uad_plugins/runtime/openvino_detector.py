"""The detector of an exported model, run by OpenVINO on the CPU: one image as fast as can be, or many at once."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from uad_plugins.artifacts import cache_folder, checked
from uad_plugins.detector import Decoded, Prediction, decode
from uad_plugins.errors import reason_of
from uad_plugins.evaluation.thresholds import Thresholds
from uad_plugins.imaging import RgbImage
from uad_plugins.runtime.exported import ExportedDetector, Facts, FloatArray
from uad_plugins.runtime.graph import prepare, read

LATENCY, THROUGHPUT = "LATENCY", "THROUGHPUT"

PATIENCE = 120.0
"""Seconds after which a request that gives no result counts as hung."""

_ABANDONED: list[Any] = []
"""Hung requests: to release one means to wait for it."""


class OpenVinoDetector(ExportedDetector):
    """Runs ``model.xml`` or ``model.onnx``.

    ``infer`` runs one request at a time on all cores; ``stream`` keeps as many in flight as OpenVINO advises. Each compiles
    the model for its purpose when it is first called. Not to be used by two threads at a time.

    Args:
        path: The model file.
        facts: What has to be known of it.
        thresholds: Decision thresholds.
        name: For messages.
        threads: CPU threads; None lets OpenVINO choose.
        pixels: The model takes 8-bit pixels already; otherwise normalisation is put into its graph.
        outputs: Names of score and map; None: the first two outputs.
        key: Hash of the model's content: what OpenVINO makes of it is kept under that name in the user's cache folder. None:
            nothing is kept.
    """

    engine = "openvino"
    patience = PATIENCE

    def __init__(
        self,
        path: Path,
        facts: Facts,
        thresholds: Thresholds,
        name: str,
        threads: int | None = None,
        pixels: bool = False,
        outputs: tuple[str, str] | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(path, facts, thresholds, name)
        self._core = openvino.Core()
        model = checked(path, read)
        self._model = model if pixels else prepare(model, self.mean, self.std)
        self._outputs, self._threads, self._key = outputs, threads, key
        self._single: _Request | None = None
        self._compiled: Any = None

    def run(self, image: RgbImage) -> tuple[float, FloatArray]:
        """Run the model; see ``ExportedDetector.run``."""
        if self._single is None:
            self._single = _Request(self.compile(LATENCY), self._outputs)
        return self._single.infer(image)

    def compile(self, hint: str) -> Any:
        """Return the model compiled for ``LATENCY`` or ``THROUGHPUT``."""
        # What is float stays FP32: BF16, the default where the CPU has it, rounds the distances of the map to 8 bits.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": hint}
        if self._threads is not None:
            options["INFERENCE_NUM_THREADS"] = self._threads
        if self._key is not None:
            try:
                cached = {**options, "CACHE_DIR": str(cache_folder("openvino") / self._key)}
                return self._core.compile_model(self._model, "CPU", cached)
            except (OSError, RuntimeError) as error:
                warnings.warn(f"OpenVINO's cache is left unused: {reason_of(error)}", RuntimeWarning, stacklevel=2)
        return checked(self.path, lambda _: self._core.compile_model(self._model, "CPU", options))

    def stream(
        self,
        paths: Iterable[str],
        *,
        categories: Iterable[str | None] | None = None,
        batch_size: int = 16,
        readers: int = 4,
    ) -> Iterator[Prediction]:
        """Score images in the order given: decoding, resizing and inference overlap.

        Memory is bounded: at most ``batch_size`` decoded images wait for inference, and each request holds one. When a
        request hangs, the images in flight and all later ones are scored one by one, with a warning.

        Args:
            paths: Image files.
            categories: Not used: the model is the same for all.
            batch_size: Images decoded ahead.
            readers: Decoding threads.
        """
        del categories
        remaining = iter(paths)
        waiting: deque[tuple[str, Future[Decoded]]] = deque()
        with ThreadPoolExecutor(max_workers=readers) as pool:

            def read_ahead() -> None:
                for path in islice(remaining, max(batch_size, 1) - len(waiting)):
                    waiting.append((path, pool.submit(decode, path, self.image_size)))

            def decoded() -> Iterator[tuple[str, Decoded]]:
                read_ahead()
                while waiting:
                    path, future = waiting.popleft()
                    item = future.result()
                    read_ahead()
                    yield path, item

            try:
                yield from self._overlapped(decoded())
            finally:
                for _, future in waiting:
                    future.cancel()

    def _overlapped(self, images: Iterator[tuple[str, Decoded]]) -> Iterator[Prediction]:
        if self._compiled is None:
            self._compiled = self.compile(THROUGHPUT)
        advised = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        # Twice as many: a core that is done with an image finds the next one waiting.
        requests = [_Request(self._compiled, self._outputs) for _ in range(2 * advised)]
        free, flying = deque(requests), deque[tuple[str, Decoded, _Request | None]]()
        hung = False

        def land() -> Prediction:
            """Return the prediction of the oldest image in flight."""
            nonlocal hung
            path, item, request = flying.popleft()
            if item.pixels is None:
                return Prediction(path, float("nan"), None, (0, 0), item.error)
            if request is not None and not hung:
                if request.wait(self.patience):
                    free.append(request)
                    return Prediction(path, *request.result(), item.size)
                hung = True
                warnings.warn(
                    f"{self.name}: OpenVINO gave no result within {self.patience:g} s; going on one image at a time",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return Prediction(path, *self.run(item.pixels), item.size)

        try:
            for path, item in images:
                while not free and not hung:
                    yield land()
                request = None if hung or item.pixels is None else free.popleft()
                if request is not None and item.pixels is not None:
                    request.start(item.pixels)
                flying.append((path, item, request))
                while flying and (hung or flying[0][2] is None or flying[0][2].wait(0)):
                    yield land()
            while flying:
                yield land()
        finally:
            if hung:
                _ABANDONED.extend(requests)
            for _, _, request in flying:
                if request is not None and not hung:
                    request.wait(self.patience)


class _Request:
    """One image at a time, in buffers that are allocated once."""

    def __init__(self, compiled: Any, outputs: tuple[str, str] | None) -> None:
        self._request = compiled.create_infer_request()
        self._input = self._request.get_input_tensor().data
        self._score, self._map = (compiled.output(name) for name in outputs or (0, 1))

    def infer(self, image: RgbImage) -> tuple[float, FloatArray]:
        """Score an image, uint8 ``(H, W, 3)``."""
        self._input[0] = image
        self._request.infer(share_outputs=True)
        return self.result()

    def start(self, image: RgbImage) -> None:
        """Start an image; what the request held before must have been taken."""
        self._input[0] = image
        self._request.start_async()

    def wait(self, seconds: float) -> bool:
        """Wait for the result; tell whether it is there."""
        return bool(self._request.wait_for(int(1000 * seconds)))

    def result(self) -> tuple[float, FloatArray]:
        """Return score and map ``(H, W)``, copied: the buffers take the next image."""
        anomaly_map = self._request.get_tensor(self._map).data
        score = self._request.get_tensor(self._score).data
        return float(score.reshape(())), np.array(anomaly_map.reshape(anomaly_map.shape[-2:]), np.float32)
