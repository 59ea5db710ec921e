"""Finding plugins, isolating broken ones, and looking them up."""

import importlib.metadata
import sys
import types

import pytest
import typer

from uad_plugins import registry as module
from uad_plugins.errors import UadxError, UsageError
from uad_plugins.hookspecs import CommandPlugin, LayoutPlugin, ModelPlugin, RuntimePlugin, hookimpl


def layout(name):
    return LayoutPlugin(name, "a layout", lambda root: 0.0, lambda root: [])


class FakePoint:
    """An entry point of a distribution that is not installed."""

    def __init__(self, name, loaded, distribution="acme-uadx"):
        self.name = name
        self.loaded = loaded
        self.dist = types.SimpleNamespace(name=distribution, version="3.1")

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def plugin(**hooks):
    """A module with hook implementations."""
    made = types.ModuleType("fake_plugin")
    for name, function in hooks.items():
        setattr(made, name, hookimpl(function))
    return made


def of_layout(**wrong):
    """A plugin with a layout that has a wrong attribute."""
    right = {"name": "acme", "summary": "a layout", "recognise": lambda root: 0.0, "scan": lambda root: []}
    return plugin(uadx_register_layouts=lambda: [LayoutPlugin(**{**right, **wrong})])


@pytest.fixture
def install(monkeypatch):
    points = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "uadx.plugins" else [])
    return points.append


def test_the_built_in_plugins_come_through_the_same_hooks(install):
    loaded = module.load()
    assert loaded.names("layout") == ["folder", "index", "mvtec", "visa"]
    assert loaded.names("model") == ["anomalib", "reverse_distillation", "stfpm", "uninformed_students"]
    assert loaded.names("runtime") == ["onnxruntime", "openvino", "tensorrt", "torch"]
    assert loaded.names("target") == ["onnx", "openvino-cpu", "ovms", "tensorrt-jetson", "triton"]
    assert loaded.names("quantizer") == ["fp16", "fp32", "nncf-qat", "openvino-int8", "tensorrt-int8"]
    assert {entry.distribution for entry in loaded.entries.values()} == {"uadx"}


def test_a_third_party_plugin_is_found_with_its_distribution(install):
    install(FakePoint("acme", plugin(uadx_register_layouts=lambda: [layout("acme")])))
    entry = module.load().entries["layout", "acme"]
    assert (entry.distribution, entry.version, entry.plugin) == ("acme-uadx", "3.1", "acme")


@pytest.mark.parametrize(
    ("loaded", "reason"),
    [
        (ImportError("no module named acme"), "ImportError: no module named acme"),
        (plugin(uadx_register_layouts=lambda: 1 / 0), "ZeroDivisionError: division by zero"),
        (
            plugin(uadx_register_layouts=lambda: ["mvtec"]),
            "TypeError: uadx_register_layouts returned str, expected LayoutPlugin",
        ),
        (plugin(uadx_register_layout=lambda: []), "unknown hook 'uadx_register_layout'"),
        (of_layout(name=None), "LayoutPlugin.name is None, expected a value of type str"),
        (of_layout(name="my layout"), "LayoutPlugin.name is 'my layout', expected a word without blanks"),
        (of_layout(summary=None), "LayoutPlugin.summary of layout 'acme' is None, expected a value of type str"),
        (of_layout(scan="scan"), "LayoutPlugin.scan of layout 'acme' is 'scan', expected a function"),
        (of_layout(priority="high"), "LayoutPlugin.priority of layout 'acme' is 'high', expected a value of type int"),
        (
            plugin(uadx_register_models=lambda: [ModelPlugin("acme", "a method", id, id, options={})]),
            "ModelPlugin.options of model 'acme' is {}, expected a class of options (pydantic.BaseModel)",
        ),
        (
            plugin(uadx_register_runtimes=lambda: [RuntimePlugin("acme", "an engine", id, requires=("acme",))]),
            "RuntimePlugin.requires of runtime 'acme' is ('acme',), expected Requirements",
        ),
        (
            plugin(uadx_register_commands=lambda: [CommandPlugin("acme", "a command", "app")]),
            "CommandPlugin.app of command 'acme' is 'app', expected a Typer app",
        ),
        (
            plugin(uadx_register_commands=lambda: [CommandPlugin("train", "a command", typer.Typer())]),
            "command 'train' has the name of a built-in command",
        ),
    ],
)
def test_a_broken_plugin_is_isolated_with_its_reason(install, loaded, reason):
    install(FakePoint("acme", loaded))
    install(FakePoint("sound", plugin(uadx_register_layouts=lambda: [layout("sound")])))
    found = module.load()
    assert [(broken.name, broken.distribution) for broken in found.broken] == [("acme", "acme-uadx")]
    assert found.broken[0].reason.startswith(reason)
    assert "sound" in found.names("layout")


def test_plugins_of_two_distributions_may_have_the_same_name(install):
    install(FakePoint("layouts", plugin(uadx_register_layouts=lambda: [layout("one")]), "acme"))
    install(FakePoint("layouts", plugin(uadx_register_layouts=lambda: [layout("other")]), "zeta"))
    found = module.load()
    assert found.broken == []
    assert {found.entries["layout", name].distribution for name in ("one", "other")} == {"acme", "zeta"}


def test_the_built_in_commands_are_those_of_the_program(install):
    from uadx.app import app

    commands = {command.name for command in app.registered_commands}
    assert {*commands, *(group.name for group in app.registered_groups)} == module.BUILTIN_COMMANDS


def test_half_a_registration_is_undone(install):
    def models():
        raise RuntimeError("too late")

    install(FakePoint("acme", plugin(uadx_register_layouts=lambda: [layout("acme")], uadx_register_runtimes=models)))
    assert "acme" not in module.load().names("layout")


def test_a_clash_names_both_owners(install):
    install(FakePoint("acme", plugin(uadx_register_layouts=lambda: [layout("mvtec")])))
    (broken,) = module.load().broken
    assert broken.reason == ("layout 'mvtec' is registered twice: by uad_plugins.data.plugin (uadx) and by acme (acme-uadx)")


def test_asking_for_something_of_a_broken_plugin_gives_its_reason(install):
    install(FakePoint("acme", ImportError("no module named acme")))
    with pytest.raises(UsageError) as error:
        module.load().get("layout", "acme")
    assert "acme: ImportError: no module named acme" in error.value.hint


def test_an_unknown_name_is_answered_with_the_nearest_and_with_what_exists(install):
    with pytest.raises(UsageError) as error:
        module.load().get("layout", "mvtek")
    assert error.value.message == "unknown layout 'mvtek'"
    assert error.value.hint == "did you mean 'mvtec'? known: folder, index, mvtec, visa"


@pytest.mark.parametrize(
    ("selection", "expected"),
    [(None, ["one", "two"]), ("", []), ("one", ["one"]), ("acme-uadx", ["one"]), ("one, two", ["one", "two"])],
)
def test_the_environment_narrows_the_set(install, monkeypatch, selection, expected):
    install(FakePoint("one", plugin(uadx_register_layouts=lambda: [layout("one")])))
    install(FakePoint("two", plugin(uadx_register_layouts=lambda: [layout("two")]), "other"))
    if selection is None:
        monkeypatch.delenv("UADX_LOAD_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("UADX_LOAD_PLUGINS", selection)
    names = module.load().names("layout")
    assert [name for name in ("one", "two") if name in names] == expected


def test_a_module_that_is_not_installed_can_be_named(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "site_layouts", plugin(uadx_register_layouts=lambda: [layout("site")]))
    assert "site" in module.load(selection="site_layouts").names("layout")


def test_a_name_that_is_nothing_is_listed_as_broken(install):
    (broken,) = module.load(selection="no_such_module_at_all").broken
    assert (broken.name, broken.reason) == (
        "no_such_module_at_all",
        "ModuleNotFoundError: No module named 'no_such_module_at_all'",
    )


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_the_strict_switch_raises(install, monkeypatch, switch):
    install(FakePoint("acme", ImportError("gone")))
    if switch == "environment":
        monkeypatch.setenv("UADX_STRICT_PLUGINS", "1")
    with pytest.raises(UadxError, match="plugin 'acme' failed to load: ImportError: gone"):
        module.load(strict=True if switch == "argument" else None)


def test_a_failure_is_said_once_on_stderr(install, capsys):
    install(FakePoint("acme", ImportError("gone")))
    module.registry.cache_clear()
    try:
        module.registry()
        module.registry()
    finally:
        module.registry.cache_clear()
    assert capsys.readouterr().err == "uadx: plugin 'acme' was left out: ImportError: gone (see 'uadx plugins list')\n"


def test_distribution_names_are_compared_as_package_indexes_do(install):
    install(FakePoint("one", plugin(uadx_register_layouts=lambda: [layout("one")]), "Acme_Layouts"))
    found = module.load(selection="acme-layouts")
    assert "one" in found.names("layout")
    assert found.broken == []


@pytest.fixture
def fresh():
    module.registry.cache_clear()
    yield
    module.registry.cache_clear()


def test_a_configuration_can_name_plugin_modules(install, fresh, monkeypatch):
    from uad_plugins.config import resolve

    monkeypatch.setitem(sys.modules, "site_layouts", plugin(uadx_register_layouts=lambda: [layout("site")]))
    assert resolve(flags={"plugins": ["site_layouts"]}, environment={}).plugins == ["site_layouts"]
    resolve(flags={"plugins": ["site_layouts"]}, environment={})
    assert "site" in module.registry().names("layout")
    # Of one that is installed, too, its module can be named.
    installed = plugin(uadx_register_layouts=lambda: [layout("acme")])
    install(FakePoint("acme", installed))
    module.registry.cache_clear()
    monkeypatch.setitem(sys.modules, "acme_layouts", installed)
    resolve(flags={"plugins": ["acme_layouts"]}, environment={})
    assert "acme" in module.registry().names("layout")
    with pytest.raises(UadxError, match="plugin module 'no_such_module' cannot be loaded: ModuleNotFoundError"):
        resolve(flags={"plugins": ["no_such_module"]}, environment={})


def test_a_layout_that_fails_to_look_does_not_stop_the_others(install, fresh, products, capsys):
    from uad_plugins.data.layouts import recognise

    bad = LayoutPlugin("bad", "a layout", lambda root: 1 / 0, lambda root: [])
    odd = LayoutPlugin("odd", "a layout", lambda root: None, lambda root: [])
    install(FakePoint("acme", plugin(uadx_register_layouts=lambda: [bad, odd])))
    assert recognise(products).name == "mvtec"
    told = capsys.readouterr().err
    assert all(f"layout '{name}' could not look at" in told for name in ("bad", "odd"))


def test_an_engine_that_fails_does_not_stop_the_others(install, fresh, trained):
    from uad_plugins.detector import open_detector
    from uad_plugins.hookspecs import RuntimePlugin

    bad = RuntimePlugin("bad", "an engine", lambda folder: 1 / 0, priority=9)
    install(FakePoint("acme", plugin(uadx_register_runtimes=lambda: [bad])))
    with pytest.warns(RuntimeWarning, match="bad: ZeroDivisionError"), open_detector(trained) as detector:
        assert detector.engine == "torch"
    with pytest.raises(UadxError) as error:
        open_detector(trained.parent)
    assert "bad: ZeroDivisionError" in error.value.message


def test_commands_of_plugins_are_added(install, fresh, capsys):
    from uadx.app import add_plugin_commands

    single, group = typer.Typer(), typer.Typer()

    @single.command(hidden=True)
    def hello():
        typer.echo("hello")

    @group.command()
    def inner():
        typer.echo("inner")

    group.add_typer(typer.Typer(), name="more")
    commands = [
        CommandPlugin("hello", "says hello", single),
        CommandPlugin("group", "a group", group),
    ]
    install(FakePoint("acme", plugin(uadx_register_commands=lambda: commands)))
    application = typer.Typer()
    application.command("train")(lambda: None)
    add_plugin_commands(application)
    added = {command.name: command for command in application.registered_commands}
    assert set(added) == {"train", "hello"}
    assert (added["hello"].hidden, added["hello"].help) == (True, "says hello")
    assert [entry.name for entry in application.registered_groups] == ["group"]
    assert capsys.readouterr().err == ""
