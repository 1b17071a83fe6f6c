"""What makes one pipeline object guarded: its class becomes a subclass of its own, as `torch.nn.utils.parametrize` does it.

The classes of diffusers are left alone, and so are all other pipelines. The subclass has the name of its base; it differs in what a call, a copy
and a pickle of a guarded pipeline are.
"""

from __future__ import annotations

import functools
import types
from copy import deepcopy
from typing import Any

from .backbone import Backbone
from .engine import SEAMS, Engine
from .errors import SafetyBypassed
from .tap import Hook
from .wrapping import Seam

KEY = "_safelight"


def engine_of(pipe: Any) -> Engine | None:
    """What guards a pipeline; None if nothing does."""
    return vars(pipe).get(KEY)


def take(pipe: Any) -> Engine:
    """The engine of a pipeline, made if there is none.

    Raises:
        UnsupportedPipeline: if no backbone knows it.
    """
    engine = engine_of(pipe) if hasattr(pipe, "__dict__") else None
    if engine is None:
        engine = vars(pipe)[KEY] = Engine(pipe, Backbone.of(pipe))
    if not _is_guarded(type(pipe)):
        pipe.__class__ = _guarded(type(pipe))
    return engine


def release(pipe: Any) -> None:
    """Makes a pipeline what it was, once no guard is left."""
    engine = engine_of(pipe) if hasattr(pipe, "__dict__") else None
    if engine is None or not engine.guards:
        if _is_guarded(type(pipe)):
            pipe.__class__ = type(pipe).__mro__[1]
        if engine is not None:
            del vars(pipe)[KEY]


def _is_guarded(kind: type[Any]) -> bool:
    return "_safelight_guarded" in vars(kind)


def _guarded(kind: type[Any]) -> type[Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        if engine is None or not engine.guards:  # whoever attached or removed the guard was interrupted at it
            release(self)
            return kind.__call__(self, *args, **kwargs)
        return engine.generate(functools.partial(kind.__call__, self), args, kwargs)

    functools.update_wrapper(__call__, kind.__call__)
    names = {
        "__call__": __call__, "__copy__": _copied, "__deepcopy__": _deeply_copied, "__reduce_ex__": _refuse_to_pickle, "_safelight_guarded": True,
    }  # fmt: skip
    made = type(kind.__name__, (kind,), names)
    made.__module__, made.__qualname__, made.__doc__ = kind.__module__, kind.__qualname__, kind.__doc__
    return made


def _copied(self: Any) -> Any:
    """A sibling on the same components, as guarded as this one."""
    clone = _bare(self)
    vars(clone).update({name: value for name, value in vars(self).items() if name != KEY and not isinstance(value, Seam)})
    return _guarded_like(self, clone)


def _deeply_copied(self: Any, memo: dict[int, Any]) -> Any:
    """A whole copy, as guarded as this one: nothing in it calls, or is called by, the original's parts."""
    clone = memo[id(self)] = _bare(self)
    for name, value in vars(self).items():
        if name != KEY and not isinstance(value, Seam):
            vars(clone)[name] = deepcopy(value, memo)
    _clean(clone)
    return _guarded_like(self, clone)


def _bare(pipe: Any) -> Any:
    kind: Any = type(pipe).__mro__[1]
    return kind.__new__(kind)


def _guarded_like(pipe: Any, clone: Any) -> Any:
    for one in vars(pipe)[KEY].guards:
        one.attach_to(clone)
    return clone


def _clean(pipe: Any) -> None:
    """Takes out of a copy what the original's guard had put into its parts."""
    backbone = Backbone.of(pipe)
    for owner in (pipe.scheduler, pipe.image_processor, getattr(pipe, "vae", None), *backbone.module.modules()):
        for name in SEAMS:
            method = vars(owner).get(name) if owner is not None else None
            if isinstance(method, types.MethodType) and method.__func__ is getattr(type(owner), name, None):
                delattr(owner, name)
    for module in backbone.module.modules():
        Hook.remove(module, lambda hook: True)


def _refuse_to_pickle(self: Any, protocol: Any) -> Any:
    raise SafetyBypassed(
        "a guarded pipeline can't be pickled, as its guard would be lost; remove the guard, and attach one where it is loaded"
    )


__all__ = ["engine_of", "release", "take"]
