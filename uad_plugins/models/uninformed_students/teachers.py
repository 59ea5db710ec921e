"""Where teachers come from: the package, the cache, or a distillation that fills the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn
from torch.nn import functional as F

from uad_plugins.artifacts import atomic_path, cache_folder
from uad_plugins.config import read_yaml, recipe_path
from uad_plugins.errors import UadxError, reason_of
from uad_plugins.models.backbones import BUNDLED, WeightsRecord, load_backbone
from uad_plugins.models.uninformed_students.distillation import LossWeights, distil
from uad_plugins.models.uninformed_students.networks import PatchNetwork
from uad_plugins.models.uninformed_students.options import NORMAL, PROCEDURAL, TeacherRecipe
from uad_plugins.models.uninformed_students.patches import PatchSource, from_dataset, from_folder
from uad_plugins.models.uninformed_students.procedural import procedural_source
from uad_plugins.models.uninformed_students.processes import on_first_process
from uad_plugins.progress import Progress, counting

VERSION = 3
"""Changes whenever the same recipe would give another teacher."""

ASSETS = Path(__file__).parent.parent / "assets"

Reporter = Callable[[str], AbstractContextManager[Progress]]
"""Given what is done, gives the function that shows how far it is."""


@dataclass(frozen=True)
class TeacherRecord:
    """Where a teacher came from.

    Attributes:
        patch_size: 17, 33 or 65.
        width: Share of the paper's channels.
        source: ``bundled`` or ``distilled``.
        key: SHA-256 of everything that determines it, hexadecimal.
        images: What it was distilled on, in words.
        steps: How many steps.
        loss: Mean over the last tenth of them.
        weights_sha256: Of the pretrained network's weights.
    """

    patch_size: int
    width: float
    source: Literal["bundled", "distilled"]
    key: str
    images: str
    steps: int
    loss: float
    weights_sha256: str


class PretrainedFeature(nn.Module):
    """The pooled feature of a ResNet: the target of the distillation.

    A network that was trained on whole objects says little about 33 pixels in which each of its last features covers all of
    them; patches are therefore enlarged.

    Args:
        backbone: timm ResNet.
        weights: ``hub``, ``bundled`` or a path.
        layer: 2, 3 or 4. The bundled weights end after layer 3, whose feature is then the target.
        size: Smaller patches are enlarged to this side; 0: never.

    Attributes:
        record: Where the weights came from.

    Raises:
        UadxError: The weights are missing or of another architecture.
    """

    record: WeightsRecord

    def __init__(self, backbone: str, weights: str, layer: int = 4, size: int = 64) -> None:
        super().__init__()
        self.layer = min(layer, 3) if weights == BUNDLED else layer
        self.size = size
        self.network = timm.create_model(backbone.partition(".")[0], features_only=True, out_indices=[self.layer])
        self.record = load_backbone(self.network, backbone, weights)
        self.requires_grad_(False).eval()

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the feature of patches ``(N, 3, p, p)``, float32 ``(N, n)``."""
        if patches.shape[-1] < self.size:
            patches = F.interpolate(patches, size=(self.size, self.size), mode="bilinear", align_corners=False)
        feature: torch.Tensor = self.network(patches)[0]
        return feature.mean(dim=(-2, -1))


def teacher_key(recipe: TeacherRecipe, patch_size: int, width: float, target: PretrainedFeature, source: PatchSource) -> str:
    """Return the SHA-256 of everything that determines a teacher."""
    facts = {
        "version": VERSION,
        # The images and the layer that there are, not those that were asked for.
        "recipe": recipe.model_dump(mode="json", exclude={"images", "layer"}),
        "patch_size": patch_size,
        "width": width,
        "layer": target.layer,
        "weights": target.record.sha256,
        "images": source.fingerprint,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def distilled_teacher(
    recipe: TeacherRecipe,
    patch_size: int,
    width: float,
    target: PretrainedFeature,
    source: PatchSource,
    *,
    folder: Path | None = None,
    device: torch.device | None = None,
    report: Reporter | None = None,
) -> tuple[PatchNetwork, TeacherRecord]:
    """Return a teacher from the cache, or distil it; an interrupted distillation goes on where it stopped.

    Args:
        recipe: How it is distilled.
        patch_size: 17, 33 or 65.
        width: Share of the paper's channels.
        target: The pretrained network.
        source: Patches.
        folder: The cache; None: the user's.
        device: Where it is distilled.
        report: Shows progress.

    Raises:
        UadxError: The loss is no finite number, or no image is large enough.
    """
    key = teacher_key(recipe, patch_size, width, target, source)
    folder = folder or cache_folder("teachers")
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            teacher, record = load_teacher(path)
            # The same images, wherever they lay when it was distilled.
            return teacher, replace(record, images=source.description)
        except UadxError:
            # A cache may always be filled anew.
            path.unlink()
    checkpoint = folder / f"{key}.ckpt"

    def run(progress: Progress | None) -> tuple[PatchNetwork, float]:
        return distil(
            patch_size,
            width,
            target.to(device or torch.device("cpu")),
            source.batches(patch_size, recipe.batch_size, recipe.seed, twins=recipe.metric > 0),
            steps=recipe.steps,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            weights=LossWeights(recipe.knowledge, recipe.metric, recipe.compactness, recipe.margin),
            seed=recipe.seed,
            checkpoint=checkpoint,
            device=device,
            progress=progress,
        )

    if report is None:
        teacher, loss = run(None)
    else:
        with report(f"distilling the teacher of {patch_size}x{patch_size} patches") as progress:
            teacher, loss = run(progress)
    record = TeacherRecord(patch_size, width, "distilled", key, source.description, recipe.steps, loss, target.record.sha256)
    save_teacher(teacher, record, path)
    checkpoint.unlink(missing_ok=True)
    return teacher, record


def distilled_teachers(
    strategy: Any,
    recipe: TeacherRecipe,
    patch_sizes: Sequence[int],
    width: float,
    target: PretrainedFeature,
    source: Callable[[], PatchSource],
) -> list[tuple[PatchNetwork, TeacherRecord]]:
    """Return the teacher of each patch size in every process of a training; see ``distilled_teacher``.

    Args:
        strategy: Lightning's.
        recipe: How they are distilled.
        patch_sizes: Of 17, 33, 65.
        width: Share of the paper's channels.
        target: The pretrained network.
        source: Gives the patches.
    """

    def work(beat: Callable[[], None]) -> list[tuple[PatchNetwork, TeacherRecord]]:
        @contextmanager
        def report(what: str) -> Iterator[Progress]:
            with counting(what) as show:

                def update(done: int, total: int) -> None:
                    beat()
                    show(done, total)

                yield update

        options: dict[str, Any] = {"device": strategy.root_device, "report": report}
        patches = source()
        # Whether a teacher was in the cache must not change the random numbers of the training.
        with torch.random.fork_rng(devices=[]):
            # The largest first: images that are too small for it are found before anything is distilled.
            ordered = sorted(patch_sizes, reverse=True)
            found = {size: distilled_teacher(recipe, size, width, target, patches, **options) for size in ordered}
            return [found[size] for size in patch_sizes]

    return on_first_process(strategy, work)


def patch_source(images: str | None, training: Any, size: tuple[int, int]) -> PatchSource:
    """Return what a recipe says that patches are cropped from.

    Args:
        images: ``TeacherRecipe.images``.
        training: The training data set.
        size: ``(height, width)`` that training images are used at.

    Raises:
        UadxError: There are no such images.
    """
    if images == PROCEDURAL:
        return procedural_source()
    return from_dataset(training, size) if images in (None, NORMAL) else from_folder(Path(images))


def shipped_recipes() -> list[TeacherRecipe]:
    """Return the defaults, and the recipes in the configurations that ship.

    Who has one of these has asked for no teacher in particular, and the one that ships will do.
    """
    shipped = (read_yaml(path).get("model", {}) for path in sorted(recipe_path("uninformed_students").parent.glob("*.yaml")))
    options = (model.get("options", {}) for model in shipped if model.get("name") == "uninformed_students")
    return [TeacherRecipe(), *(TeacherRecipe.model_validate(section.get("teacher", {})) for section in options)]


def bundled_teacher(patch_size: int, width: float) -> tuple[PatchNetwork, TeacherRecord] | None:
    """Return the teacher that ships with the package; None where none does for this patch size and width."""
    path = ASSETS / bundled_name(patch_size, width)
    if not path.is_file():
        return None
    teacher, record = load_teacher(path)
    return teacher, TeacherRecord(**{**asdict(record), "source": "bundled"})


def bundled_name(patch_size: int, width: float) -> str:
    """Return the file name of a teacher that ships with the package."""
    return f"teacher_{patch_size}_{round(width * 100)}.safetensors"


def save_teacher(teacher: PatchNetwork, record: TeacherRecord, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a teacher and its record as one safetensors file."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in teacher.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"uadx.teacher": json.dumps(asdict(record))}))


def load_teacher(path: Path) -> tuple[PatchNetwork, TeacherRecord]:
    """Read what ``save_teacher`` wrote.

    Raises:
        UadxError: The file is damaged or is none.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = TeacherRecord(**json.loads((file.metadata() or {})["uadx.teacher"]))
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        teacher = PatchNetwork(record.patch_size, 1, record.width)
        teacher.load_state_dict(state)
    except Exception as error:
        # safetensors raises its own kinds, and what it holds may be anything.
        raise UadxError(f"{path}: not a teacher of uadx: {reason_of(error)}", "distil it anew") from error
    return teacher.requires_grad_(False).eval(), record


def records_as_dict(records: Iterable[TeacherRecord]) -> list[dict[str, Any]]:
    """Return records as plain dictionaries, for manifests and checkpoints."""
    return [asdict(record) for record in records]
