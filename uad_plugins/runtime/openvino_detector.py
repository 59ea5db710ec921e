"""The detector of an exported model, run by OpenVINO on the CPU: one image as fast as can be, or many at once."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from uad_plugins.artifacts import cache_folder, checked
from uad_plugins.detector import BATCH_SIZE, READERS, Decoded, Prediction, decode
from uad_plugins.errors import reason_of
from uad_plugins.evaluation.thresholds import Thresholds
from uad_plugins.imaging import RgbImage
from uad_plugins.runtime.exported import ExportedDetector, Facts, FloatArray
from uad_plugins.runtime.graph import prepare, read

LATENCY, THROUGHPUT = "LATENCY", "THROUGHPUT"

PATIENCE = 120.0
"""Seconds after which a request that gives no result counts as hung."""

POLL = 0.005
"""Seconds between two looks at the younger requests while the oldest is waited for."""

_ABANDONED: list[Any] = []
"""Hung requests: to release one means to wait for it."""


class OpenVinoDetector(ExportedDetector):
    """Runs ``model.xml`` or ``model.onnx``.

    ``infer`` runs one request at a time on all cores, and so does a ``stream`` of a single image; of several it keeps twice
    as many in flight as OpenVINO advises. Each compiles the model for its purpose when it is first called. Requests are
    kept for the next stream, and after a queue has hung none is used again. Not to be used by two threads at a time.

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
        self._idle: list[_Request] = []
        self._hung = False

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
        batch_size: int = BATCH_SIZE,
        readers: int = READERS,
    ) -> Iterator[Prediction]:
        """Score images in the order given: decoding, resizing and inference overlap; a single one is scored as by ``infer``.

        Memory is bounded: at most ``batch_size`` decoded images wait for inference, and twice as many images as there are
        requests are under way or wait for an older one. When a request hangs, the images in flight and all later ones, of
        later streams too, are scored one by one, with a warning.

        Args:
            paths: Image files.
            categories: Not used: the model is the same for all.
            batch_size: Images decoded ahead.
            readers: Decoding threads.
        """
        del categories
        remaining: Iterator[str] = iter(paths)
        first = list(islice(remaining, 2))
        if len(first) < 2:
            for path in first:
                yield self._scored(_Flight(path, decode(path, self.image_size)))
            return
        remaining = chain(first, remaining)
        waiting: deque[tuple[str, Future[Decoded]]] = deque()
        pool = self.decoders(readers)

        def read_ahead() -> None:
            for path in islice(remaining, max(batch_size, 1) - len(waiting)):
                waiting.append((path, pool.submit(decode, path, self.image_size)))

        def decoded() -> Iterator[_Flight]:
            read_ahead()
            while waiting:
                path, future = waiting.popleft()
                item = future.result()
                read_ahead()
                yield _Flight(path, item)

        try:
            yield from self._overlapped(decoded())
        finally:
            for _, future in waiting:
                future.cancel()

    def _overlapped(self, images: Iterator[_Flight]) -> Iterator[Prediction]:
        """Yield a prediction for each image, in order, with as many requests under way as there are."""
        queue = _Queue([] if self._hung else self._take_requests())
        try:
            for flight in images:
                while queue.working and not queue.takes(flight):
                    self._await(queue)
                    yield from map(self._scored, queue.landed())
                if queue.working:
                    queue.add(flight)
                    queue.collect()
                    yield from map(self._scored, queue.landed())
                else:
                    yield self._scored(flight)
            while queue.flying:
                self._await(queue)
                yield from map(self._scored, queue.landed())
        finally:
            if queue.working and queue.finish(self.patience):
                # For the next stream. One that began before this one ended has made its own.
                self._idle = queue.requests
            elif queue.working:
                self._give_up(queue)

    def _take_requests(self) -> list[_Request]:
        if self._compiled is None:
            self._compiled = self.compile(THROUGHPUT)
        taken, self._idle = self._idle, []
        if not taken:
            advised = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
            # Twice as many: a core that is done with an image finds the next one waiting.
            taken = [_Request(self._compiled, self._outputs) for _ in range(2 * advised)]
        return taken

    def _await(self, queue: _Queue) -> None:
        """Wait until an image has landed, or the queue counts as hung: then all of them count as landed, without result."""
        if not queue.wait(self.patience):
            self._give_up(queue)

    def _give_up(self, queue: _Queue) -> None:
        self._hung = True
        queue.abandon()
        _ABANDONED.extend(queue.requests)
        warnings.warn(
            f"{self.name}: OpenVINO gave no result within {self.patience:g} s; going on one image at a time",
            RuntimeWarning,
            stacklevel=2,
        )

    def _scored(self, flight: _Flight) -> Prediction:
        if flight.item.pixels is None:
            return Prediction(flight.path, float("nan"), None, (0, 0), flight.item.error)
        score, anomaly_map = flight.result or self.run(flight.item.pixels)
        return Prediction(flight.path, score, anomaly_map, flight.item.size)


@dataclass
class _Flight:
    """An image on its way: decoded, with a request while that works on it, with a result after that."""

    path: str
    item: Decoded
    request: _Request | None = None
    result: tuple[float, FloatArray] | None = None


class _Queue:
    """Requests and the images that they work on; results leave in the order of the images.

    A request is free as soon as it has finished, whatever the older ones do.
    """

    def __init__(self, requests: list[_Request]) -> None:
        self.requests = requests
        self.working = bool(requests)
        self.free = deque(requests)
        self.flying: deque[_Flight] = deque()

    def takes(self, flight: _Flight) -> bool:
        """Tell whether there is room: results that wait for an older one take memory too."""
        return len(self.flying) < 2 * len(self.requests) and (flight.item.pixels is None or bool(self.free))

    def add(self, flight: _Flight) -> None:
        """Start an image."""
        if flight.item.pixels is not None:
            flight.request = self.free.popleft()
            flight.request.start(flight.item.pixels)
        self.flying.append(flight)

    def collect(self) -> bool:
        """Free the requests that have finished; tell whether there was one."""
        before = len(self.free)
        for flight in self.flying:
            if flight.request is not None and flight.request.wait(0):
                flight.result = flight.request.result()
                self.free.append(flight.request)
                flight.request = None
        return len(self.free) > before

    def wait(self, patience: float) -> bool:
        """Wait until a request has finished; tell whether one did within that many seconds."""
        end = time.monotonic() + patience
        while not self.collect():
            oldest = next((flight.request for flight in self.flying if flight.request is not None), None)
            if oldest is None:
                return True
            if time.monotonic() >= end:
                return False
            oldest.wait(POLL)
        return True

    def landed(self) -> Iterator[_Flight]:
        """Yield the oldest images as long as nothing works on them any more."""
        while self.flying and self.flying[0].request is None:
            yield self.flying.popleft()

    def abandon(self) -> None:
        """Give up all that has not landed, and the requests."""
        self.working = False
        for flight in self.flying:
            flight.request = None

    def finish(self, patience: float) -> bool:
        """Wait for what is under way and drop it; tell whether all requests are free."""
        under_way = [flight.request for flight in self.flying if flight.request is not None]
        self.flying.clear()
        return all(request.wait(patience) for request in under_way)


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
