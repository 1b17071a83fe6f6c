"""Wrapping bound methods on one instance: shared by all guards that reach the instance, undone in any order, whole in a copy."""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Protocol

from .errors import SafetyBypassed


class ForeignWrapperWarning(UserWarning):
    """Somebody wrapped a function after the guard did; the guard steps aside but can't take its wrapper out."""


class Attached(Protocol):
    """Who wraps a function."""

    def since(self) -> int | None:
        """When its generation on this thread began, in nanoseconds of some clock; None: it has none that is alive."""
        ...


Around = Callable[..., Any]


class Seam:
    """Stands in for a bound method of one instance. It hands each call to whoever has a generation on the calling thread.

    Two guarded pipelines may share a denoiser: then its `forward` has one seam with two handlers, and each call belongs to the pipeline that
    generates on this thread, the innermost if one generates inside another. A call that belongs to nobody goes to `outside`.
    """

    __slots__ = ("__dict__", "_handlers", "_owner", "before", "lock", "name", "original", "part_of_a_pipeline")

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self.name = owner, name
        self.original: Callable[..., Any] = getattr(owner, name)
        self.before = vars(owner).get(name)
        self._handlers: list[tuple[Attached, Around, Around | None]] = []
        self.lock = threading.RLock()
        """For whoever must not use the owner while another thread does."""
        self.part_of_a_pipeline = False
        """Whether the owner may be copied only as a part of its pipeline, whose copy is guarded too."""
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._handlers:
            return self.original(*args, **kwargs)
        chosen = self._chosen()
        return self.original(*args, **kwargs) if chosen is None else chosen(self.original, *args, **kwargs)

    def _chosen(self) -> Around | None:
        alive = [(began, around) for who, around, _ in self._handlers if (began := who.since()) is not None]
        if alive:
            return max(alive, key=lambda one: one[0])[1]
        return next((outside for _, _, outside in self._handlers if outside is not None), None)

    @property
    def busy(self) -> bool:
        """Whether anybody generates on this thread."""
        return any(who.since() is not None for who, _, _ in self._handlers)

    @property
    def intact(self) -> bool:
        """Whether calls of the owner's method still come through here."""
        return _contains(getattr(self._owner, self.name), self)

    def add(self, who: Attached, around: Around, outside: Around | None = None) -> None:
        """Calls `around(original, *args, **kwargs)` while `who` generates, and `outside(...)` while nobody does (None: the original)."""
        self._handlers.append((who, around, outside))

    def drop(self, who: Attached) -> None:
        """Takes a handler away; with the last one the seam goes, unless somebody has wrapped it: then it stays, does nothing, and a warning says so.

        Whoever is interrupted here may call it again.
        """
        rest = [handler for handler in self._handlers if handler[0] is not who]
        if not rest:
            self._take_off()
        self._handlers = rest

    def _take_off(self) -> None:
        there = vars(self._owner).get(self.name)
        if there is self and self.before is None:
            delattr(self._owner, self.name)
        elif there is self:
            setattr(self._owner, self.name, self.before)
        elif there is not self.before and self._handlers:
            warnings.warn(
                f"{type(self._owner).__name__}.{self.name} was replaced after the guard was attached; the guard is inactive now, but its "
                "empty wrapper stays until the other one is removed",
                ForeignWrapperWarning,
                stacklevel=4,
            )

    def renew(self) -> None:
        """Puts the seam on again, should somebody have restored what was there before it."""
        if not self.intact:
            self.original, self.before = getattr(self._owner, self.name), vars(self._owner).get(self.name)
            setattr(self._owner, self.name, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What stood here before, for the copy of the owner: a copy must not call the original's functions."""
        owner = memo.get(id(self._owner))
        alone = self.part_of_a_pipeline and not any(id(getattr(who, "pipe", None)) in memo for who, _, _ in self._handlers)
        if owner is None or alone:
            raise SafetyBypassed(
                f"{type(self._owner).__name__}.{self.name} is guarded and can't be copied alone; copy the pipeline, whose copy is guarded too"
            )
        if self.before is not None and not isinstance(self.before, Seam):
            return deepcopy(self.before, memo)
        return types.MethodType(getattr(type(owner), self.name), owner)

    def __reduce__(self) -> Any:
        raise SafetyBypassed(
            f"{type(self._owner).__name__} is guarded and can't be pickled; remove the guard first, and attach one after loading"
        )


def seam(owner: Any, name: str) -> Seam:
    """The seam at a bound method of an instance, made if there is none."""
    there = vars(owner).get(name)
    if isinstance(there, Seam):
        return there
    made = Seam(owner, name)
    setattr(owner, name, made)
    return made


def _contains(function: Any, wanted: Any) -> bool:
    """Whether a function is the wanted one, or was wrapped around it (with `functools.wraps`)."""
    while function is not None:
        if function is wanted:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


__all__ = ["Attached", "ForeignWrapperWarning", "Seam", "seam"]
