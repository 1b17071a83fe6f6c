"""Safelight: diffusion image generators and editors made safe at inference time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import load, save
    from .guard import Guard, guard
    from .method import Method
    from .site import Site

__version__ = "0.1.0"

_HOMES = {"Guard": "guard", "Method": "method", "Site": "site", "guard": "guard", "load": "bundle", "save": "bundle"}

__all__ = ["Guard", "Method", "Site", "guard", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # torch takes a second to import; it is not needed to ask for a name
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value  # also replaces the submodule of the same name, which importing it has bound here
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
