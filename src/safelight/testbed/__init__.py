"""A miniature world, small enough to ship, in which "unsafe" has a harmless stand-in and the truth is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipelines import load, settings

__all__ = ["load", "settings"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # diffusers takes seconds to import, and scenes need none of it
        from . import pipelines

        return getattr(pipelines, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
