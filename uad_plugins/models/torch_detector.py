"""The detector of a trained run: its checkpoint, run by torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.models import AnomalibModule
from numpy.typing import NDArray

from uad_plugins.artifacts import Run, checked, sha256_of
from uad_plugins.config import model_plugin
from uad_plugins.detector import Detector
from uad_plugins.errors import UadxError
from uad_plugins.evaluation.thresholds import NO_THRESHOLDS, Thresholds
from uad_plugins.imaging import RgbImage


class TorchDetector(Detector):
    """Runs an anomalib module.

    Args:
        model: Trained module; its pre-processor normalises images in 0..1.
        name: For messages.
        categories: Products it was trained on.
        image_size: ``(height, width)``.
        thresholds: Decision thresholds.
        device: Where it runs; None takes the GPU if there is one.
        batch_size: Images that the network sees at once; larger batches are taken in parts. None: no limit.
    """

    engine = "torch"

    def __init__(
        self,
        model: AnomalibModule,
        name: str,
        categories: list[str],
        image_size: tuple[int, int],
        thresholds: Thresholds,
        device: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.name = name
        self.categories = categories
        self.image_size = image_size
        self.thresholds = thresholds
        self.batch_size = batch_size
        self.by_category = bool(getattr(model, "by_category", False))

    @classmethod
    def open(cls, folder: Path, device: str | None = None) -> TorchDetector:
        """Open a finished run.

        Raises:
            UadxError: The folder is no finished run, or a file in it is damaged.
        """
        run = Run.open(folder)
        expected = run.manifest().checkpoint_sha256
        if expected and run.checkpoint.is_file() and sha256_of(run.checkpoint) != expected:
            raise UadxError(
                f"{run.checkpoint}: is not the checkpoint that was trained", "its content has changed; train again"
            )
        return cls.load(run, Thresholds.read(run.thresholds_file), device)

    @classmethod
    def load(cls, run: Run, thresholds: Thresholds = NO_THRESHOLDS, device: str | None = None) -> TorchDetector:
        """Load the checkpoint of a run, finished or not.

        Args:
            run: The run.
            thresholds: Decision thresholds; without any nothing is anomalous.
            device: See the class.

        Raises:
            UadxError: A file of the run is damaged.
        """
        manifest, config = run.manifest(), run.config()
        model = checked(run.checkpoint, lambda path: model_plugin(config.model.name).load(path, config))
        facts = (manifest.categories, manifest.image_size, thresholds)
        return cls(model, str(run.folder), *facts, device, config.data.eval_batch_size)

    def infer(self, images: RgbImage) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score a batch; see ``Detector.infer``."""
        return self._infer(images)

    def infer_by_category(
        self, images: RgbImage, categories: Sequence[str | None]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score a batch by a model whose statistics are by category; see ``Detector.infer_by_category``."""
        known: list[str] = self.model.categories
        for name in categories:
            if name not in known:
                missing = "each image needs its category" if name is None else f"it has not seen '{name}'"
                raise UadxError(
                    f"{self.name}: its statistics are by category, and {missing}",
                    f"name one: {', '.join(known)}; or train with model.options.statistics=global",
                )
        return self._infer(images, torch.tensor([known.index(str(name)) for name in categories], device=self.device))

    def _infer(self, images: RgbImage, *more: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        size = self.batch_size or len(images)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        found = [self._infer_at_once(images[part], *(values[part] for values in more)) for part in parts]
        scores, maps = zip(*found, strict=True)
        return np.concatenate(scores), np.concatenate(maps)

    def _infer_at_once(self, images: RgbImage, *more: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).contiguous().float().div_(255)
            if self.model.pre_processor is not None:
                batch = self.model.pre_processor(batch)
            output = self.model.model(batch, *more)
            maps, scores = output.anomaly_map, output.pred_score
            if scores is None:
                if maps is None:
                    raise UadxError(f"{self.name}: the model gives neither a score nor a map")
                scores = maps.amax(dim=(-2, -1))
            scores = scores.reshape(len(images)).float().cpu().numpy()
            if maps is None:
                return scores, np.broadcast_to(scores[:, None, None], (len(images), *self.image_size)).astype(np.float32)
            return scores, maps.reshape(len(images), *maps.shape[-2:]).float().cpu().numpy()
