"""``uadx teacher``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from uad_plugins.errors import UadxError, UsageError, missing_extra
from uadx.output import counting, emit_json, say

app = typer.Typer(help="Teachers of Uninformed Students: distilled by 'uadx train' where missing, or here beforehand.")


@app.callback()
def _teacher() -> None:
    """Teachers of Uninformed Students: distilled by 'uadx train' where missing, or here beforehand."""


@app.command("distill")
def distill(
    images: Annotated[str, typer.Argument(help="Folder of natural images, or 'procedural'.", metavar="IMAGES")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write the teacher to this file.", metavar="FILE")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Take patch sizes, width, backbone and recipe from this YAML file, or recipe that ships.",
            metavar="FILE",
        ),
    ] = None,
    patch_size: Annotated[int | None, typer.Option("--patch-size", help="17, 33 or 65; without --config 33.")] = None,
    width: Annotated[
        float | None, typer.Option("--width", help="Channels as a share of the paper's; without --config 1.0.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", help="timm ResNet to distil from; without --config resnet18.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Its weights: hub, bundled, or a file or folder; without --config hub.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set one key of the recipe, such as steps.", metavar="KEY=VALUE")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Write --out with half precision: half the size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document for each teacher.")] = False,
) -> None:
    """Distil a teacher into the cache, where 'uadx train' with the same recipe finds it.

    With --config one for each of its patch sizes; other options win over it. An interrupted distillation goes on when the
    command is given again.
    """
    from pydantic import ValidationError

    from uad_plugins.config import from_assignments
    from uad_plugins.models.uninformed_students.options import PROCEDURAL, WIDEST, TeacherRecipe

    base, changes = _settings(config), from_assignments(set_ or [])
    if "images" in changes:
        raise UsageError("--set images: the images are the argument", f"uadx teacher distill {changes['images']}")
    given: dict[str, Any] = {**base.teacher, **changes}
    try:
        recipe = TeacherRecipe.model_validate({**given, "images": images})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        known = ", ".join(name for name in TeacherRecipe.model_fields if name != "images")
        raise UsageError(f"--set {key}: {first['msg']}", f"keys: {known}") from None
    patch_sizes = base.patch_sizes if patch_size is None else [patch_size]
    backbone, weights = backbone or base.backbone, weights or base.weights
    width = base.width if width is None else width
    if not 0 < width <= WIDEST:
        raise UsageError(f"--width {width:g}: no share of the paper's channels", f"above 0 and at most {WIDEST}")
    if half and out is None:
        raise UsageError("--half is of the file that --out writes", "add --out FILE, or leave --half out")
    if patch_size not in (None, 17, 33, 65):
        raise UsageError(f"--patch-size {patch_size}: there is no such patch network", "17, 33 or 65")
    if out is not None and len(patch_sizes) > 1:
        raise UsageError("--out takes one teacher", f"choose one with --patch-size: {', '.join(map(str, patch_sizes))}")
    out = out.expanduser() if out is not None else None
    if out is not None and out.exists():
        raise UadxError(f"{out}: exists", "name another file")
    try:
        import torch

        from uad_plugins.models.backbones import require_architecture
        from uad_plugins.models.uninformed_students.patches import from_folder
        from uad_plugins.models.uninformed_students.procedural import procedural_source
        from uad_plugins.models.uninformed_students.teachers import PretrainedFeature, distilled_teacher, save_teacher
    except ModuleNotFoundError as error:
        raise missing_extra("distilling", "train", error) from error
    source = procedural_source() if images == PROCEDURAL else from_folder(Path(images))
    require_architecture(backbone)
    target = PretrainedFeature(backbone, weights, recipe.layer, recipe.target_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The largest first: images that are too small for it are found before anything is distilled.
    for size in sorted(patch_sizes, reverse=True):
        teacher, record = distilled_teacher(recipe, size, width, target, source, device=device, report=counting)
        if out is not None:
            save_teacher(teacher, record, out, torch.float16 if half else torch.float32)
        if as_json:
            emit_json(asdict(record))
            continue
        say(f"teacher of {size}x{size} patches: {record.steps} steps, loss {record.loss:.4g}, from {record.images}")
        say(f"key {record.key}")


@dataclass(frozen=True)
class _Settings:
    patch_sizes: list[int]
    width: float
    backbone: str
    weights: str
    teacher: dict[str, Any]


def _settings(path: Path | None) -> _Settings:
    """Return what a configuration says of teachers; without one the paper's middle scale."""
    from uad_plugins.config import find_config, resolve
    from uad_plugins.models.uninformed_students.options import UninformedStudentsOptions

    if path is None:
        return _Settings([33], 1.0, "resnet18", "hub", {})
    config = resolve(file=find_config(path))
    if config.model.name != "uninformed_students":
        raise UsageError(f"{path}: a configuration of {config.model.name}, which has no such teacher", "see configs/")
    options = UninformedStudentsOptions.model_validate(config.model.options)
    model = config.model
    teacher = options.teacher.model_dump(mode="json")
    return _Settings(list(options.patch_sizes), options.width, model.backbone or "resnet18", model.weights, teacher)
