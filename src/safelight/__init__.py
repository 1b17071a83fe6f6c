"""Safelight: diffusion image generators and editors made safe at inference time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import Guard, guard
    from .bundle import load, save
    from .combination import recommended
    from .method import Method
    from .site import Site

__version__ = "0.1.0"

_HOMES = {
    "Guard": "attach",
    "Method": "method",
    "Site": "site",
    "guard": "attach",
    "load": "bundle",
    "recommended": "combination",
    "save": "bundle",
}

__all__ = ["Guard", "Method", "Site", "guard", "load", "recommended", "save"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # torch takes a second to import; it is not needed to ask for a name
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
