"""The detector of a bundle for Jetson, run by TensorRT: the bundle's own runner, inside uadx. No torch in here.

No engine has been built on a device yet; this is checked against TensorRT's real classes without what they do.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from contextlib import ExitStack
from functools import partial

import numpy as np
import pycuda.driver as cuda

from uad_plugins.artifacts import cache_folder
from uad_plugins.deployment.bundle import Bundle
from uad_plugins.deployment.jetson.uadx_jetson.bundle import Bundle as DeviceBundle
from uad_plugins.deployment.jetson.uadx_jetson.bundle import read_bundle
from uad_plugins.deployment.jetson.uadx_jetson.devices import Gpu, gpu
from uad_plugins.deployment.jetson.uadx_jetson.engines import EngineFiles, ensure_engine, fits, load_engine
from uad_plugins.deployment.jetson.uadx_jetson.files import RunnerError
from uad_plugins.deployment.jetson.uadx_jetson.imaging import Normaliser
from uad_plugins.deployment.jetson.uadx_jetson.inference import Session
from uad_plugins.detector import Detector
from uad_plugins.errors import EngineError, UadxError
from uad_plugins.imaging import RgbImage
from uad_plugins.runtime.exported import FloatArray

ON_THE_DEVICE = "see docs/jetson.md; python3 runner.py build shows TensorRT's messages"


class TensorRtDetector(Detector):
    """Runs ``model.onnx`` by the engine that TensorRT makes of it; the engine is built when there is none that fits.

    The engine lies in the bundle's folder ``engine``; where none there fits and none can be written, in the user's cache
    folder.

    Args:
        bundle: The bundle.

    Raises:
        EngineError: There is no GPU, or TensorRT cannot build or load the engine.
    """

    engine = "tensorrt"

    def __init__(self, bundle: Bundle) -> None:
        self.name = bundle.name
        self.categories = bundle.manifest.categories
        self.image_size = bundle.manifest.image_size
        self.thresholds = bundle.thresholds
        try:
            # In a block, so that the context of the GPU is given back whatever happens, and says what CUDA complains of.
            with ExitStack() as held:
                known = read_bundle(bundle.folder, verified=True)
                device = held.enter_context(gpu())
                files = _engine_files(bundle, known, device)
                ensure_engine(known, files, device, lambda line: warnings.warn(line, stacklevel=2))
                self._session = held.enter_context(Session(load_engine(files), known))
                self._normaliser = Normaliser(known)
                self._held = held.pop_all()
        except RunnerError as error:
            raise EngineError(f"{bundle.name}: {error}", ON_THE_DEVICE) from None

    def infer(self, images: RgbImage) -> tuple[FloatArray, FloatArray]:
        """Score a batch; see ``Detector.infer``. While one image is on the device the next is copied there."""
        scores = np.empty(len(images), np.float32)
        maps = np.empty((len(images), *self.image_size), np.float32)
        lanes = self._session.lanes
        try:
            for index in range(len(images) + len(lanes)):
                lane, done = lanes[index % len(lanes)], index - len(lanes)
                if 0 <= done < len(images):
                    scores[done], maps[done] = lane.fetch()
                if index < len(images):
                    lane.submit(partial(self._normaliser.fill, images[index]))
        except cuda.Error as error:
            raise UadxError(f"{self.name}: CUDA: {error}", ON_THE_DEVICE) from None
        except RunnerError as error:
            raise UadxError(f"{self.name}: {error}", ON_THE_DEVICE) from None
        return scores, maps

    def close(self) -> None:
        """Give the device's memory and its context back."""
        super().close()
        # After an error of CUDA nothing works any more; why was said when it happened.
        with contextlib.suppress(RunnerError):
            self._held.close()


def _engine_files(bundle: Bundle, known: DeviceBundle, device: Gpu) -> EngineFiles:
    beside = EngineFiles(bundle.folder / "engine")
    written = beside.folder if beside.folder.is_dir() else bundle.folder
    if os.access(written, os.W_OK | os.X_OK) or fits(known, beside, device):
        return beside
    return EngineFiles(cache_folder("tensorrt") / bundle.manifest.seal)
