"""Step callbacks: whoever puts other latents in the place of the denoiser's draws with them, and no prompt tells what."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor

NAMES = ("callback_on_step_end", "callback")
"""The arguments of pipelines that hold one; the second is an older one."""


def watched(callback: Any, changed: Callable[[], None]) -> Any:
    """A callback of the same kind that calls `changed` if the latents are others after it."""
    if isinstance(callback, type) or not hasattr(callback, "tensor_inputs"):
        return lambda *args, **kwargs: _called(callback, changed, *args, **kwargs)
    kind: Any = type(callback)  # pipelines look at the class of diffusers' own callbacks, and take their inputs from them
    own = copy(callback)
    own.__class__ = type(kind.__name__, (kind,), {"__call__": lambda self, *args, **kwargs: _called(callback, changed, *args, **kwargs)})
    return own


def _called(callback: Any, changed: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
    values = next((one for one in reversed([*args, *kwargs.values()]) if isinstance(one, dict)), {})
    latents = [one for one in (values.get("latents"), *args[2:]) if isinstance(one, Tensor)]
    before = [one.detach().clone() for one in latents]
    result = callback(*args, **kwargs)
    after = result.get("latents") if isinstance(result, dict) else None
    others = after is not None and (not latents or after is not latents[0]) and not (before and _same(after, before[0]))
    if others or any(not _same(now, then) for now, then in zip(latents, before, strict=True)):
        changed()
    return result


def _same(left: Any, right: Tensor) -> bool:
    return isinstance(left, Tensor) and left.shape == right.shape and bool((left.to(right) == right).all())


__all__ = ["NAMES", "watched"]
