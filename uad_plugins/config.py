"""The configuration of a training: its schema, and how defaults, recipe, file, environment and flags are merged.

Later sources win: schema defaults < the method's recipe < a YAML file < ``UADX_TRAIN__SECTION__KEY`` < flags.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator

from uad_plugins.errors import UadxError, UsageError, nearest
from uad_plugins.registry import registry, use_plugins

ENVIRONMENT_PREFIX = "UADX_TRAIN__"


class Section(BaseModel):
    """Base of all sections: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class ModelConfig(Section):
    """What is trained."""

    name: str = Field("stfpm", description="Method: see 'uadx plugins list', or anomalib:CLASS for any other of anomalib's.")
    backbone: str | None = Field(None, description="timm backbone; null takes the method's own.")
    layers: list[str] | None = Field(None, description="Backbone layers that features are taken from; null: the method's.")
    weights: str = Field("hub", description="Backbone weights: hub, bundled, or the path of a file or folder.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the method itself.")


class DataConfig(Section):
    """What it is trained on."""

    layout: str | None = Field(None, description="Data layout; null recognises it.")
    categories: list[str] | None = Field(None, description="Restrict to these categories; null takes all.")
    image_size: int | tuple[PositiveInt, PositiveInt] = Field(256, description="Input side, or [height, width], from 32 px.")
    train_batch_size: PositiveInt = Field(32, description="Images in a training batch, in each process.")
    eval_batch_size: PositiveInt = Field(32, description="Images that the network sees at once in evaluation.")
    num_workers: Annotated[int, Field(ge=0)] | None = Field(None, description="Loader processes; null chooses by cores.")
    sampling: Literal["natural", "balanced"] = Field("natural", description="How categories share an epoch.")
    samples_per_epoch: PositiveInt | None = Field(None, description="Images that make one epoch; null: all.")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="Share of normal training images held out, per category.")
    split_seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = Field(
        None, description="Seed of which images are held out; null: that of the training."
    )
    skip_bad: bool = Field(False, description="Leave unreadable images out instead of stopping.")
    cache: bool = Field(True, description="Keep decoded images on disk while training, where they fit.")

    @field_validator("image_size")
    @classmethod
    def _at_least_32(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(value if isinstance(value, tuple) else (value,)) < 32:
            raise ValueError("must be at least 32 pixels")
        return value

    @property
    def size(self) -> tuple[int, int]:
        """Input size as ``(height, width)``."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class AugmentationConfig(Section):
    """How training images are varied: by what a good part may look like at the line, and no more. 0 varies nothing."""

    share: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Probability that an image is moved (shift, rotate and scale together), that its brightness is changed, "
        "its contrast; of each flip, half of it.",
    )
    shift: float = Field(0.0, ge=0, le=0.5, description="Largest shift, as a share of the image's sides.")
    rotate: float = Field(0.0, ge=0, le=180, description="Largest angle, in degrees.")
    scale: float = Field(0.0, ge=0, le=0.5, description="Largest change of size, as a share of it.")
    flip: Literal["none", "horizontal", "vertical", "both"] = Field("none", description="Whether images may be mirrored.")
    brightness: float = Field(0.0, ge=0, le=0.5, description="Largest amount added, as a share of the full range.")
    contrast: float = Field(0.0, ge=0, le=0.5, description="Largest change of the factor that values are multiplied by.")

    def __bool__(self) -> bool:
        """Whether anything varies."""
        return self.flip != "none" or any(self.model_dump(exclude={"share", "flip"}).values())


class OptimizerConfig(Section):
    """How the weights are updated. A method from ``anomalib:`` brings its own optimizer; this section is then unused."""

    name: Literal["sgd", "adam", "adamw"] = Field("sgd", description="Optimizer.")
    lr: PositiveFloat = Field(0.4, description="Learning rate at its highest.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum (sgd).")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Moment decay rates (adam, adamw).")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay.")
    schedule: Literal["constant", "cosine"] = Field("constant", description="Learning rate over the training.")
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of all steps in which the learning rate rises from 0.")


class ThresholdConfig(Section):
    """How decision thresholds are set after training."""

    method: Literal["normal-fpr", "best-f1"] = Field(
        "normal-fpr", description="From held-out normal images, or best F1 on labelled validation images."
    )
    target_fpr: float = Field(0.01, gt=0, lt=1, description="Share of good parts that may be rejected (normal-fpr).")


class TrainConfig(Section):
    """Everything that determines a training."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    thresholds: ThresholdConfig = Field(default_factory=ThresholdConfig)
    trainer: dict[str, Any] = Field(
        default_factory=lambda: {"max_epochs": 100}, description="Arguments of Lightning's Trainer."
    )
    plugins: list[str] = Field(default_factory=list, description="Plugin modules to load besides the installed ones.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of split, order and initial weights.")

    @property
    def split_seed(self) -> int:
        """Seed of which images are held out."""
        return self.seed if self.data.split_seed is None else self.data.split_seed


def recipe_path(name: str) -> Path:
    """Return the path of a YAML file that ships with the package (``stfpm`` -> ``configs/stfpm.yaml``)."""
    packaged = Path(__file__).parent / "configs" / f"{name}.yaml"
    # In a checkout the folder lies beside the package, in a wheel inside it.
    return packaged if packaged.is_file() else Path(__file__).parents[1] / "configs" / f"{name}.yaml"


def find_config(path: Path) -> Path:
    """Return the file that ``--config`` means: a path, or the bare name of a recipe that ships with the package.

    Raises:
        UadxError: There is neither.
    """
    recipes = {file.stem: file for file in sorted(recipe_path("stfpm").parent.glob("*.yaml"))}
    name = str(path).removesuffix(".yaml")
    # Runs are often named after their recipe: a folder of that name does not hide it.
    if not path.is_file() and name in recipes:
        return recipes[name]
    if path.exists():
        return path
    close = nearest(name, recipes)
    meant = f"did you mean '{close}'? " if close else ""
    raise UadxError(
        f"{path}: no such configuration file", f"{meant}give a path, or a recipe that ships: {', '.join(recipes)}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UadxError: The file is missing or is not a YAML mapping; the message names the line.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UadxError(f"{path}: no such configuration file", "check the path given to --config") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UadxError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content or {}, dict):
        raise UadxError(f"{path}: expected sections such as 'model:' and 'data:'")
    return content or {}


def from_environment(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the configuration that ``UADX_TRAIN__SECTION__KEY`` variables give.

    Raises:
        UsageError: One lacks an underscore.
    """
    tree: dict[str, Any] = {}
    for name, value in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENVIRONMENT_PREFIX.rstrip("_")) and not name.startswith(ENVIRONMENT_PREFIX):
            raise UsageError(
                f"the environment variable {name} would be ignored",
                f"two underscores go between its words: {ENVIRONMENT_PREFIX}SECTION__KEY",
            )
        if name.startswith(ENVIRONMENT_PREFIX):
            put(tree, name[len(ENVIRONMENT_PREFIX) :].lower().split("__"), parse_value(value))
    return tree


def from_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that ``section.key=value`` words give; values are read as YAML.

    Raises:
        UsageError: A word has no ``=``.
    """
    tree: dict[str, Any] = {}
    for word in assignments:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise UsageError(f"'{word}' is not KEY=VALUE", "for example --set data.train_batch_size=16")
        put(tree, key.strip().split("."), parse_value(value))
    return tree


def parse_value(text: str) -> Any:
    """Read a scalar or list as YAML does, with ``1e-4`` as a number too."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value in a tree of dictionaries, making the branches."""
    for step in path[:-1]:
        branch = tree.setdefault(step, {})
        if not isinstance(branch, dict):
            raise UsageError(f"'{'.'.join(path)}': '{step}' already has a value and no keys below it")
        tree = branch
    tree[path[-1]] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two trees of dictionaries; where both have a value the second wins."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def resolve(
    *, file: Path | None = None, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> TrainConfig:
    """Merge all sources to a validated configuration.

    Args:
        file: YAML file, or None.
        flags: Tree from the command line.
        environment: Environment variables; None takes the process's own.

    Raises:
        UsageError: A key is unknown (with the nearest name), a value is out of range, or the method does not exist.
    """
    given: dict[str, Any] = {}
    for source in (read_yaml(file) if file else {}, from_environment(environment), flags or {}):
        given = merge(given, source)
    wanted = given.get("plugins")
    use_plugins([str(name) for name in wanted] if isinstance(wanted, list) else [])
    section = given.get("model")
    name = str((section.get("name") if isinstance(section, Mapping) else None) or ModelConfig().name)
    plugin = model_plugin(name)
    defaults = TrainConfig().model_dump(mode="json")
    config = validate(merge(merge(defaults, recipe_of(plugin, name)), given))
    config.model.options = validated(plugin.options, config.model.options, ("model", "options")).model_dump(mode="json")
    return config


def recipe_of(plugin: Any, name: str) -> dict[str, Any]:
    """Return the defaults that a method's plugin brings: those of its recipe, or of the class in a folder of recipes.

    Args:
        plugin: The plugin.
        name: The method as it is named, for example ``anomalib:EfficientAd``.
    """
    path: Path | None = plugin.recipe
    if path is not None and path.is_dir():
        path = path / f"{name.partition(':')[2]}.yaml"
        return read_yaml(path) if path.is_file() else {}
    return read_yaml(path) if path is not None else {}


def model_plugin(name: str) -> Any:
    """Return the plugin of a method; ``anomalib:CLASS`` names the plugin ``anomalib``."""
    return registry().get("model", name.partition(":")[0])


def ratio_scale(name: str) -> bool:
    """Return ``ModelPlugin.ratio_scale`` of a method; True for one that is not installed here."""
    return all(plugin.ratio_scale for plugin in registry().items("model") if plugin.name == name.partition(":")[0])


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """Validate a tree against the schema.

    Raises:
        UsageError: See ``resolve``.
    """
    return validated(TrainConfig, tree)


def validated(schema: type[Any], tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Any:
    """Validate a tree against a pydantic model.

    Args:
        schema: The model.
        tree: What was given.
        prefix: Where the tree lies in the configuration, for messages.

    Raises:
        UsageError: A key is unknown (with the nearest name), or a value is out of range.
    """
    try:
        return schema.model_validate(dict(tree))
    except ValidationError as error:
        first = error.errors()[0]
        location = [*prefix, *(str(step) for step in first["loc"])]
        known = {".".join([*prefix, key]) for key in keys(schema)}
        if first["type"] == "extra_forbidden":
            raise unknown_key(location, known) from None
        # What pydantic adds to a key is the type it has tried.
        whole = next((end for end in range(len(location)) if ".".join(location[:end]) in known), len(location))
        location = location[:whole] + [step for step in location[whole:] if step.isdigit()]
        if first["type"] in {"model_type", "dict_type"}:
            raise no_section(location, known, first["input"]) from None
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{'.'.join(location)}: {reason}", f"given: {first['input']!r}") from None


def no_section(location: Sequence[str], known: set[str], given: Any) -> UsageError:
    """Build the error for a value where a section with keys is needed, with the first key that would take it."""
    section = ".".join(location)
    keys_of = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section)
    key = "name" if "name" in keys_of else next(iter(keys_of), "KEY")
    value = given if key == "name" and isinstance(given, str) else "VALUE"
    hint = f"for example '{location[-1]}: {{{key}: {value}}}'"
    return UsageError(f"{section}: a section with keys is needed, not {given!r}", hint)


def unknown_key(location: Sequence[str], known: set[str]) -> UsageError:
    """Build the error for a configuration key that does not exist, with the nearest one that does."""
    key = ".".join(location)
    section = ".".join(location[:-1])
    above = f"{section}." if section else ""
    words = sorted({name.removeprefix(above).partition(".")[0] for name in known if name.startswith(above)})
    siblings = {word: above + word for word in words}
    elsewhere = [name for name in sorted(known) if name.endswith(f".{location[-1]}")]
    # By the last word among its siblings: what all of them begin with makes any two alike.
    near = None if len(elsewhere) == 1 else nearest(location[-1], siblings)
    close = siblings[near] if near else next(iter(elsewhere), None) or (None if siblings else nearest(key, known))
    hint = f"did you mean '{close}'?" if close else f"known keys: {', '.join(sorted(siblings.values())) or 'none'}"
    return UsageError(f"unknown configuration key '{key}'", hint)


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key of a schema, dotted."""
    for name, information in schema.model_fields.items():
        annotation = information.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def to_yaml(config: TrainConfig) -> str:
    """Write a configuration as YAML that ``resolve`` reads back to the same."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
