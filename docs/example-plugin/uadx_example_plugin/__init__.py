"""An example of a uadx plugin: a data layout and a command."""

from __future__ import annotations

from uad_plugins.hookspecs import CommandPlugin, LayoutPlugin, hookimpl
from uadx_example_plugin import count, dated


@hookimpl
def uadx_register_layouts() -> list[LayoutPlugin]:
    """Return the layout ``dated``."""
    return [LayoutPlugin(name="dated", summary=dated.SUMMARY, recognise=dated.recognise, scan=dated.scan)]


@hookimpl
def uadx_register_commands() -> list[CommandPlugin]:
    """Return the command ``uadx count``."""
    return [CommandPlugin(name="count", summary="Count the images of each category.", app=count.app)]
