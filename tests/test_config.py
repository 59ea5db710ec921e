"""Merging and checking the configuration."""

from pathlib import Path

import pytest
import yaml

from uad_plugins.config import (
    TrainConfig,
    find_config,
    from_assignments,
    from_environment,
    keys,
    merge,
    parse_value,
    recipe_path,
    resolve,
    to_yaml,
    validate,
)
from uad_plugins.errors import UadxError, UsageError

RECIPES = sorted(path.stem for path in recipe_path("stfpm").parent.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_that_ships_is_valid(name):
    config = resolve(file=recipe_path(name), environment={})
    assert validate(yaml.safe_load(to_yaml(config))) == config


def test_the_published_recipes_are_the_defaults_of_their_methods():
    stfpm = resolve(flags={"model": {"name": "stfpm"}}, environment={})
    assert (stfpm.optimizer.name, stfpm.optimizer.lr, stfpm.optimizer.momentum) == ("sgd", 0.4, 0.9)
    assert (stfpm.optimizer.weight_decay, stfpm.data.train_batch_size, stfpm.trainer["max_epochs"]) == (1e-4, 32, 398)
    reverse = resolve(flags={"model": {"name": "reverse_distillation"}}, environment={})
    assert (reverse.model.backbone, reverse.optimizer.name, reverse.optimizer.lr) == ("wide_resnet50_2", "adam", 5e-3)
    assert (reverse.optimizer.betas, reverse.optimizer.weight_decay) == ((0.5, 0.999), 1e-5)
    assert (reverse.data.train_batch_size, reverse.trainer["max_epochs"]) == (16, 200)


def test_later_sources_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer: {lr: 0.2, momentum: 0.5, weight_decay: 0.01}\nseed: 1\n")
    environment = {"UADX_TRAIN__OPTIMIZER__LR": "0.3", "UADX_TRAIN__SEED": "2", "HOME": "/"}
    config = resolve(file=file, flags={"seed": 3}, environment=environment)
    # schema < recipe < file < environment < flags
    assert config.data.val_fraction == 0.1
    assert config.data.train_batch_size == 32
    assert config.optimizer.momentum == 0.5
    assert config.optimizer.lr == 0.3
    assert config.seed == 3


@pytest.mark.parametrize(
    ("tree", "message", "hint"),
    [
        ({"optimizer": {"lrr": 1}}, "unknown configuration key 'optimizer.lrr'", "did you mean 'optimizer.lr'?"),
        ({"optimiser": {"lr": 1}}, "unknown configuration key 'optimiser'", "did you mean 'optimizer'?"),
        ({"modl": {"name": "stfpm"}}, "unknown configuration key 'modl'", "did you mean 'model'?"),
        ({"lr": 1}, "unknown configuration key 'lr'", "did you mean 'optimizer.lr'?"),
        ({"method": 1}, "unknown configuration key 'method'", "did you mean 'thresholds.method'?"),
        ({"train_batch_size": 1}, "unknown configuration key 'train_batch_size'", "did you mean 'data.train_batch_size'?"),
        ({"quality": 1}, "unknown configuration key 'quality'", "known keys: augmentation, data, model, optimizer, plugins"),
        ({"data": {"size": 64}}, "unknown configuration key 'data.size'", "data.image_size"),
        ({"data": {"image_size": 8}}, "data.image_size: must be at least 32 pixels", "given: 8"),
        ({"data": {"image_size": "abc"}}, "data.image_size: Input should be a valid integer", "given: 'abc'"),
        ({"data": {"image_size": [64, "x"]}}, "data.image_size: Input should be a valid integer", "given: [64, 'x']"),
        ({"optimizer": {"betas": [0.5, "x"]}}, "optimizer.betas.1: Input should be a valid number", "given: 'x'"),
        ({"data": {"val_fraction": 1}}, "data.val_fraction: Input should be less than 1", "given: 1"),
        ({"model": "stfpm"}, "model: a section with keys is needed, not 'stfpm'", "'model: {name: stfpm}'"),
        ({"data": 3}, "data: a section with keys is needed, not 3", "'data: {cache: VALUE}'"),
        ({"trainer": [1]}, "trainer: a section with keys is needed, not [1]", "'trainer: {KEY: VALUE}'"),
        ({"model": {"options": 1}}, "model.options: a section with keys is needed, not 1", "'options: {KEY: VALUE}'"),
        ({"model": {"name": "stpm"}}, "unknown model 'stpm'", "did you mean 'stfpm'?"),
        (
            {"model": {"options": {"alpha": 1}}},
            "unknown configuration key 'model.options.alpha'",
            "known keys: model.options.",
        ),
        (
            {"model": {"options": {"anomaly_wait": 1}}},
            "unknown configuration key 'model.options.anomaly_wait'",
            "anomaly_weight'?",
        ),
        (
            {"model": {"name": "uninformed_students", "options": {"synthetic_anomalies": 0.5}}},
            "unknown configuration key 'model.options.synthetic_anomalies'",
            "known keys: model.options.patch_sizes",
        ),
    ],
)
def test_wrong_configuration_is_one_line_with_a_way_out(tree, message, hint):
    with pytest.raises(UsageError) as error:
        resolve(flags=tree, environment={})
    assert error.value.message.partition(", unable to parse")[0] == message
    assert hint in error.value.hint
    assert error.value.exit_code == 2


def test_one_argument_of_the_trainer_leaves_the_default_of_the_others():
    flags = {"model": {"name": "anomalib:Padim"}, "trainer": {"accelerator": "cpu"}}
    assert resolve(flags=flags, environment={}).trainer == {"max_epochs": 100, "accelerator": "cpu"}


def test_a_class_of_anomalib_may_have_defaults_of_its_own():
    def batch(name, **data):
        return resolve(flags={"model": {"name": name}, "data": data}, environment={}).data.train_batch_size

    assert batch("anomalib:EfficientAd") == 1
    assert batch("anomalib:EfficientAd", train_batch_size=4) == 4
    assert batch("anomalib:Padim") == 32


def test_unknown_environment_keys_are_refused():
    with pytest.raises(UsageError, match="unknown configuration key 'data.imagesize'"):
        resolve(environment={"UADX_TRAIN__DATA__IMAGESIZE": "64"})


def test_assignments_are_read_as_yaml():
    words = ["a.b=1", "a.c=[1, 2]", "d=true", "e=1e-4", "f=text with = sign", "g=null"]
    assert from_assignments(words) == {
        "a": {"b": 1, "c": [1, 2]},
        "d": True,
        "e": 1e-4,
        "f": "text with = sign",
        "g": None,
    }
    assert from_environment({"UADX_TRAIN__A__B_C": "2", "UADX_STRICT_PLUGINS": "1"}) == {"a": {"b_c": 2}}
    assert parse_value("[unclosed") == "[unclosed"
    with pytest.raises(UsageError, match="UADX_TRAIN_OPTIMIZER_LR would be ignored"):
        from_environment({"UADX_TRAIN_OPTIMIZER_LR": "1"})


@pytest.mark.parametrize("word", ["lr", "=1"])
def test_an_assignment_without_a_key_or_a_value_is_refused(word):
    with pytest.raises(UsageError, match="is not KEY=VALUE"):
        from_assignments([word])


def test_a_value_cannot_also_be_a_section():
    with pytest.raises(UsageError, match="'seed' already has a value"):
        from_assignments(["seed=1", "seed.more=2"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not a YAML file"), ("- 1\n- 2\n", "expected sections"), (None, "no such configuration file")],
)
def test_unreadable_files_are_named(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UadxError, match=message) as error:
        resolve(file=file)
    assert str(file) in error.value.message


def test_merging_leaves_its_sources_alone():
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}
    assert merge(base, over) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert (base, over) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})


def test_every_key_has_a_description():
    def undescribed(schema, prefix=""):
        for name, field in schema.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield f"{prefix}{name}"

    assert list(undescribed(TrainConfig)) == []
    assert "data.image_size" in set(keys(TrainConfig))


def test_recipes_that_ship_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(Path("stfpm_short")) == recipe_path("stfpm_short")
    (tmp_path / "stfpm_short").mkdir()
    assert find_config(Path("stfpm_short")) == recipe_path("stfpm_short")
    (tmp_path / "stfpm_short").rmdir()
    (tmp_path / "stfpm_short").write_text("seed: 1")
    assert find_config(Path("stfpm_short")) == Path("stfpm_short")
    (tmp_path / "stfpm_short").unlink()
    assert find_config(Path("stfpm.yaml")) == recipe_path("stfpm")
    for wrong in ("stfpm_shrt", "stfpm_short.yml", "stfpm_short.v2", "here/stfpm_short"):
        with pytest.raises(UadxError, match="no such configuration file") as error:
            find_config(Path(wrong))
        assert "stfpm_short" in error.value.hint
