"""TensorRT's Python module with the classes of one version and behaviour given by a test.

It is built from a surface file (see ``tensorrt_api/collect.py``): what that version has not raises AttributeError, what it
has is checked for the number and names of arguments and for settable properties, and recorded. Python 3.8, like the runner.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterable

SURFACES = Path(__file__).parent / "tensorrt_api"


class FakeTensorRT(ModuleType):
    """The module.

    Args:
        version: Of the surface file.
        behaviour: By ``Class.method`` what a method does, called with the object and the arguments; by ``Class.property``
            what a property gives, called with the object. A method without behaviour returns None if that is what the
            bindings say it returns, and fails the test otherwise.
        without: Names to take away, as ``Class.member``, to stand for an older version.
    """

    def __init__(self, version: str, behaviour: dict[str, Callable[..., Any]], without: Iterable[str] = ()) -> None:
        super().__init__("tensorrt")
        surface = read_surface(version)
        for gone in without:
            owner, _, member = gone.partition(".")
            del surface["classes"][owner][member]
        self.__version__ = surface["version"]
        self.calls: list[Any] = []
        self.behaviour = behaviour
        for name, members in surface["enums"].items():
            setattr(self, name, _Convertible(name, members))
        for name, member in surface["constants"].items():
            setattr(self, name, self.DataType[member])
        for name, members in surface["classes"].items():
            setattr(self, name, _class(self, name, members))

    def make(self, name: str, content: bytes = b"", /, **state: Any) -> Any:
        """Make an object of a class that cannot be constructed from outside; ``state`` is for the behaviour alone."""
        cls = getattr(self, name)
        made = cls.__new__(cls, content) if issubclass(cls, bytes) else cls.__new__(cls)
        object.__setattr__(made, "state", SimpleNamespace(**state))
        return made

    def called(self, name: str) -> list[Any]:
        """Return the arguments of each call of ``Class.member``, in order."""
        return [arguments for called, arguments in self.calls if called == name]

    def used(self) -> set:
        """Return the names of all members that were used."""
        return {name.partition(".")[2] for name, _ in self.calls}


def read_surface(version: str) -> Any:
    """Return what a version of TensorRT offers."""
    return json.loads((SURFACES / (version + ".json")).read_text())


class _Convertible(enum.Enum):
    # Like pybind's enums these are no integers, only convertible to one.
    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value


def _class(module: FakeTensorRT, name: str, members: dict[str, Any]) -> type:
    body: dict[str, Any] = {"__setattr__": _refuse(name, members)}
    for member, about in members.items():
        if "calls" in about:
            body[member] = _method(module, name, member, about["calls"])
        elif "type" in about:
            body[member] = _property(module, name, member, about["settable"])
        else:
            body[member] = about["constant"]
    # What the builder makes can be read as a buffer, which only a subclass of bytes can do in Python.
    return type(name, (bytes,) if name == "IHostMemory" else (object,), body)


def _refuse(name: str, members: dict[str, Any]) -> Callable[[Any, str, Any], None]:
    def setter(self: Any, member: str, value: Any) -> None:
        if not members.get(member, {}).get("settable"):
            raise AttributeError(f"{name}.{member} cannot be set")
        object.__setattr__(self, member, value)

    return setter


def _method(module: FakeTensorRT, name: str, member: str, overloads: list[Any]) -> Callable[..., Any]:
    full = name + "." + member

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        fitting = [
            returns
            for required, parameters, returns in overloads
            if len(arguments) <= len(parameters)
            and set(named) <= set(parameters[len(arguments) :])
            and required <= len(arguments) + len(set(named) & set(parameters[:required]))
        ]
        if not fitting:
            raise TypeError(f"{full}{arguments} {named}: incompatible arguments; it takes {overloads}")
        module.calls.append((full, arguments))
        if member == "__init__":
            object.__setattr__(self, "state", SimpleNamespace())
        if full in module.behaviour:
            return module.behaviour[full](self, *arguments, **named)
        if "None" not in fitting:
            raise NotImplementedError(f"no behaviour of {full} in this test")
        return None

    return method


def _property(module: FakeTensorRT, name: str, member: str, settable: bool) -> property:
    full = name + "." + member

    def getter(self: Any) -> Any:
        module.calls.append((full, ()))
        if full in module.behaviour:
            return module.behaviour[full](self)
        if member in getattr(self.state, "properties", {}):
            return self.state.properties[member]
        raise NotImplementedError(f"no behaviour of {full} in this test")

    def setter(self: Any, value: Any) -> None:
        module.calls.append((full, (value,)))
        self.state.__dict__.setdefault("properties", {})[member] = value

    return property(getter, setter if settable else None)
