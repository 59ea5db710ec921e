"""``uadx teacher``."""

from __future__ import annotations

from dataclasses import asdict
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
    patch_size: Annotated[int, typer.Option("--patch-size", help="17, 33 or 65.")] = 33,
    width: Annotated[float, typer.Option("--width", help="Channels as a share of the paper's.")] = 1.0,
    backbone: Annotated[str, typer.Option("--backbone", help="timm ResNet to distil from.")] = "resnet18",
    weights: Annotated[str, typer.Option("--weights", help="Its weights: hub, bundled, or a file or folder.")] = "hub",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set one key of the recipe, such as steps.", metavar="KEY=VALUE")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Write --out with half precision: half the size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Distil a teacher into the cache, where 'uadx train' with the same recipe finds it.

    An interrupted distillation goes on when the command is given again.
    """
    from pydantic import ValidationError

    from uad_plugins.config import from_assignments
    from uad_plugins.models.uninformed_students.options import PROCEDURAL, TeacherRecipe

    given: dict[str, Any] = from_assignments(set_ or [])
    try:
        recipe = TeacherRecipe.model_validate({**given, "images": images})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        known = ", ".join(name for name in TeacherRecipe.model_fields if name != "images")
        raise UsageError(f"--set {key}: {first['msg']}", f"keys: {known}") from None
    if patch_size not in (17, 33, 65):
        raise UsageError(f"--patch-size {patch_size}: there is no such patch network", "17, 33 or 65")
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
    teacher, record = distilled_teacher(
        recipe,
        patch_size,
        width,
        PretrainedFeature(backbone, weights, recipe.layer, recipe.target_size),
        source,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        report=counting,
    )
    if out is not None:
        save_teacher(teacher, record, out, torch.float16 if half else torch.float32)
    if as_json:
        emit_json(asdict(record))
        return
    say(f"teacher of {patch_size}x{patch_size} patches: {record.steps} steps, loss {record.loss:.4g}, from {record.images}")
    say(f"key {record.key}")
