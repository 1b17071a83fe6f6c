"""What goes into the images and no method looks at: told, refused or accepted, as each guard wants it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .callbacks import NAMES as CALLBACKS
from .callbacks import watched
from .errors import SafetyBypassed, UnjudgedImageWarning
from .generation import Generation, Handle
from .method import Method
from .pictures import pictures_in

CHANGED = "latents (changed by a callback)"
"""What records call those among what went unjudged."""


def unjudged(guards: Sequence[Handle], chain: Sequence[Method], arguments: Mapping[str, Any]) -> list[str]:
    """The arguments with pictures that no method looks at; raises or warns if there are any, as each guard wants it."""
    names = sorted({given.argument for given in pictures_in(arguments)})
    if not names or not chain or any(method.judges_images for method in chain):
        return []
    told = f"{', '.join(f'`{name}`' for name in names)} goes into the image, and no method of this guard looks at images; add pre_filter or post_filter"
    _tell(guards, told)
    return names


def with_watched_callbacks(
    generation: Generation, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of a call with its step callbacks watched: latents that they change are a picture that nobody asked for in words."""
    given = {name: generation.arguments[name] for name in CALLBACKS if generation.arguments.get(name) is not None}
    if not given or not generation.chain or any(method.judges_finished for method in generation.chain):
        return args, kwargs

    def changed() -> None:
        if CHANGED not in generation.unjudged:
            generation.unjudged.append(CHANGED)
            _tell(
                generation.guards,
                "a step callback changed the latents, and no method of this guard looks at the finished images; add post_filter",
            )

    own = {name: watched(callback, changed) for name, callback in given.items()}
    return (args, {**kwargs, **own}) if own.keys() <= kwargs.keys() else ((), {**generation.arguments, **own})


def _tell(guards: Sequence[Handle], what: str) -> None:
    """Raises or warns that something goes into the image unjudged, as each guard wants it."""
    wanted = {guard.unjudged_images for guard in guards}
    if "refuse" in wanted:
        raise SafetyBypassed(f"{what}; the images are withheld")
    if "warn" in wanted:
        warnings.warn(f"{what}, or say guard(…, unjudged_images='accept')", UnjudgedImageWarning, stacklevel=6)


__all__ = ["CHANGED", "unjudged", "with_watched_callbacks"]
