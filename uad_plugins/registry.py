"""Finds the built-in and third-party plugins, isolates the broken ones, and looks things up by kind and name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pluggy
from pydantic import BaseModel

from uad_plugins import hookspecs
from uad_plugins.errors import UadxError, reason_of, unknown_name

BUILTINS = (
    "uad_plugins.data.plugin",
    "uad_plugins.models.plugin",
    "uad_plugins.runtime.plugin",
    "uad_plugins.quantization.plugin",
    "uad_plugins.deployment.plugin",
)
BUILTIN_COMMANDS = frozenset(
    {
        "quickstart",
        "train",
        "evaluate",
        "quantize",
        "deploy",
        "predict",
        "thresholds",
        "data",
        "teacher",
        "plugins",
        "doctor",
    }
)
"""Subcommands of ``uadx`` that no plugin can replace."""
LOAD_VARIABLE = "UADX_LOAD_PLUGINS"
STRICT_VARIABLE = "UADX_STRICT_PLUGINS"


@dataclass(frozen=True)
class Entry:
    """One registered description, with the distribution that brought it."""

    kind: str
    name: str
    distribution: str
    version: str
    item: Any
    plugin: str = ""


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be loaded, with the reason."""

    name: str
    distribution: str
    version: str
    reason: str


@dataclass
class Registry:
    """Everything that is registered, by kind and name."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager("uadx"))

    def names(self, kind: str) -> list[str]:
        """Return the sorted names of one kind."""
        return sorted(name for entry_kind, name in self.entries if entry_kind == kind)

    def items(self, kind: str) -> list[Any]:
        """Return the descriptions of one kind, in the order of their names."""
        return [self.entries[kind, name].item for name in self.names(kind)]

    def get(self, kind: str, name: str) -> Any:
        """Look one description up.

        Raises:
            UsageError: Nothing has that name; the message names what exists and what failed to load.
        """
        entry = self.entries.get((kind, name))
        if entry is not None:
            return entry.item
        error = unknown_name(kind, name, self.names(kind))
        if self.broken:
            failed = "; ".join(f"{plugin.name}: {plugin.reason}" for plugin in self.broken)
            error.hint += f"; plugins that failed to load: {failed}"
        raise error


def load(*, strict: bool | None = None, selection: str | None = None) -> Registry:
    """Load the built-in plugins and those installed by third parties.

    Args:
        strict: Raise on the first plugin that fails instead of listing it as broken. None: the environment decides
            (``UADX_STRICT_PLUGINS``).
        selection: Comma-separated entry-point or distribution names of the third-party plugins to load; the empty string
            loads none. None: the environment decides (``UADX_LOAD_PLUGINS``), and without it all are loaded.

    Raises:
        UadxError: In strict mode, a plugin could not be loaded.
    """
    if strict is None:
        strict = os.environ.get(STRICT_VARIABLE, "").lower() not in {"", "0", "false", "no"}
    if selection is None:
        selection = os.environ.get(LOAD_VARIABLE)
    wanted = None if selection is None else {_normal(name) for name in selection.split(",") if name.strip()}

    registry = Registry()
    manager = registry.manager
    manager.add_hookspecs(hookspecs)
    for module_name in BUILTINS:
        _register(manager, registry, module_name, "uadx", _version("uadx"), lambda m=module_name: importlib.import_module(m))
    found: set[str] = set()
    for point in importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        distribution = point.dist.name if point.dist else "unknown"
        if wanted is not None and not wanted & {_normal(point.name), _normal(distribution)}:
            continue
        found |= {_normal(point.name), _normal(distribution)}
        _attempt(
            registry,
            point.name,
            distribution,
            point.dist.version if point.dist else "",
            strict,
            lambda p=point, d=distribution: _register(
                manager, registry, p.name, d, p.dist.version if p.dist else "", p.load
            ),
        )
    named = [name.strip() for name in (selection or "").split(",") if name.strip() and _normal(name) not in found]
    for name in sorted(named):
        _attempt(
            registry,
            name,
            "",
            "",
            strict,
            lambda n=name: _register(manager, registry, n, n, "", lambda: importlib.import_module(n)),
        )
    return registry


def _attempt(registry: Registry, name: str, distribution: str, version: str, strict: bool, action: Any) -> None:
    try:
        action()
    except (Exception, SystemExit) as error:
        # A plugin is foreign code: whatever it raises must not take the program down.
        reason = str(error) if isinstance(error, UadxError) else f"{type(error).__name__}: {reason_of(error)}"
        if strict:
            raise UadxError(
                f"plugin '{name}' failed to load: {reason}", f"fix it or leave {STRICT_VARIABLE} unset"
            ) from error
        registry.broken.append(Broken(name, distribution, version, reason))


def _register(
    manager: pluggy.PluginManager, registry: Registry, name: str, distribution: str, version: str, load_module: Any
) -> None:
    """Register one plugin whole or not at all."""
    module = load_module()
    known_hooks = {hook for hook, _ in hookspecs.KINDS.values()}
    # The same name may be that of another distribution's plugin.
    manager.register(module, f"{distribution}:{name}")
    try:
        unknown = [
            attribute
            for attribute in dir(module)
            if manager.parse_hookimpl_opts(module, attribute) is not None and attribute not in known_hooks
        ]
        if unknown:
            raise unknown_name("hook", unknown[0], known_hooks)
        fresh: dict[tuple[str, str], Entry] = {}
        for kind, (hook, cls) in hookspecs.KINDS.items():
            for implementation in getattr(manager.hook, hook).get_hookimpls():
                if implementation.plugin is not module:
                    continue
                for item in implementation.function():
                    if not isinstance(item, cls):
                        raise TypeError(f"{hook} returned {type(item).__name__}, expected {cls.__name__}")
                    require_well_formed(kind, item)
                    key = (kind, item.name)
                    owner = registry.entries.get(key) or fresh.get(key)
                    if owner is not None:
                        raise UadxError(
                            f"{kind} '{item.name}' is registered twice: by {owner.plugin} ({owner.distribution}) and by "
                            f"{name} ({distribution})"
                        )
                    fresh[key] = Entry(kind, item.name, distribution, version, item, name)
    except BaseException:
        manager.unregister(module)
        raise
    registry.entries.update(fresh)


def require_well_formed(kind: str, item: Any) -> None:
    """Check that a description holds what the contract says, so that whoever looks at it later need not.

    Raises:
        UadxError: It does not; the message says which attribute is wrong.
    """
    for attribute in dataclasses.fields(item):
        value = getattr(item, attribute.name)
        expected = _expected(str(attribute.type), value)
        if expected:
            of = "" if attribute.name == "name" else f" of {kind} '{item.name}'"
            raise UadxError(f"{type(item).__name__}.{attribute.name}{of} is {value!r}, expected {expected}")
    if not re.fullmatch(r"\S+", item.name):
        raise UadxError(f"{type(item).__name__}.name is {item.name!r}, expected a word without blanks")
    if kind == "command" and item.name in BUILTIN_COMMANDS:
        raise UadxError(f"command '{item.name}' has the name of a built-in command")


def _expected(annotation: str, value: Any) -> str:
    """Say what a description's field asks for by its annotation, where a value is none of it; empty where it is one."""
    if value is None and annotation.endswith("| None"):
        return ""
    if annotation.startswith("type[BaseModel]"):
        return "" if isinstance(value, type) and issubclass(value, BaseModel) else "a class of options (pydantic.BaseModel)"
    if annotation.startswith("Callable"):
        return "" if callable(value) else "a function"
    if annotation.startswith("tuple[Requirement"):
        met = isinstance(value, tuple | list) and all(isinstance(each, hookspecs.Requirement) for each in value)
        return "" if met else "Requirements"
    if annotation.startswith("typer"):
        import typer

        return "" if isinstance(value, typer.Typer) else "a Typer app"
    plain = {"str": str, "int": int, "bool": bool}.get(annotation)
    return "" if plain is None or isinstance(value, plain) else f"a value of type {annotation}"


def _normal(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@lru_cache(maxsize=1)
def registry() -> Registry:
    """Return the process-wide registry, loading it on first use; warn on stderr of each plugin that failed."""
    loaded = load()
    for plugin in loaded.broken:
        sys.stderr.write(f"uadx: plugin '{plugin.name}' was left out: {plugin.reason} (see 'uadx plugins list')\n")
    return loaded


def use_plugins(modules: Iterable[str]) -> None:
    """Load plugin modules that are named rather than installed, into the process-wide registry.

    Raises:
        UadxError: One cannot be loaded: whoever names a module wants it.
    """
    known = registry()
    for name in modules:
        try:
            module = importlib.import_module(name)
            if not known.manager.is_registered(module):
                _register(known.manager, known, name, name, "", lambda m=module: m)
        except (Exception, SystemExit) as error:
            # A plugin is foreign code and may raise anything.
            reason = error.message if isinstance(error, UadxError) else f"{type(error).__name__}: {reason_of(error)}"
            raise UadxError(
                f"plugin module '{name}' cannot be loaded: {reason}", "check 'plugins' in the configuration"
            ) from error


def installed(module: str) -> bool:
    """Tell whether a package, or a module of one, can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        # The package that the module would be part of is not there either.
        return False


def require_installed(plugin: Any) -> None:
    """Check that what a plugin needs is installed.

    Raises:
        UadxError: Something is not; the hint is the command that provides it.
    """
    require(plugin.name, plugin.requires)


def require(what: str, requirements: Iterable[hookspecs.Requirement]) -> None:
    """Check that what something needs is installed; see ``require_installed``."""
    for requirement in requirements:
        if not installed(requirement.module):
            raise UadxError(f"{what} needs {requirement.module}, which is not installed", requirement.install)
