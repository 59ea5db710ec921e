"""Registers the built-in data layouts."""

from __future__ import annotations

from uad_plugins.data.layouts import folder, index, mvtec, visa
from uad_plugins.hookspecs import LayoutPlugin, hookimpl


@hookimpl
def uadx_register_layouts() -> list[LayoutPlugin]:
    """Return MVTec AD, VisA, plain folders and index files."""
    return [
        LayoutPlugin("mvtec", mvtec.SUMMARY, mvtec.recognise, mvtec.scan),
        LayoutPlugin("visa", visa.SUMMARY, visa.recognise, visa.scan),
        LayoutPlugin("folder", folder.SUMMARY, folder.recognise, folder.scan),
        # Whoever writes an index means it, whatever else the folder looks like.
        LayoutPlugin("index", index.SUMMARY, index.recognise, index.scan, priority=1, exhaustive=False),
    ]
