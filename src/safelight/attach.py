"""Attaches methods to a diffusers pipeline, and takes them off again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any, Literal

from . import backbones as _known  # noqa: F401  (makes the backbones known)
from .guarded import engine_of, release, take
from .method import Method
from .record import Record
from .run import Run

Unjudged = Literal["warn", "refuse", "accept"]


def guard(pipe: Any, *methods: Method | Iterable[Method], unjudged_images: Unjudged = "warn") -> Guard:
    """Attaches `methods` to `pipe`; the first is the outermost. Use as a context manager, or call `.remove()`.

    Args:
        pipe: a diffusers pipeline.
        methods: guards, one by one or in lists; those of a second `guard` stand around those of the first.
        unjudged_images: what happens if pictures go into the pipeline (a source, a mask, a reference, given latents) and no method looks at
            pictures: a warning, a refusal (`SafetyBypassed`), or nothing. The records name them in any case.

    Raises:
        UnsupportedPipeline: if no backbone knows the pipeline, or something attached to it conflicts with guards.
        TypeError: for something that is no method.
        ValueError: if a method names a site that the denoiser doesn't have, or a field is out of range.
    """
    if unjudged_images not in ("warn", "refuse", "accept"):
        raise ValueError(f"unjudged_images={unjudged_images!r} is not one of warn, refuse, accept")
    return Guard(pipe, tuple(_flat(methods)), unjudged_images)


class Guard:
    """The handle of an attachment, in the manner of PyTorch's `RemovableHandle`."""

    def __init__(self, pipe: Any, methods: tuple[Method, ...], unjudged_images: Unjudged) -> None:
        self.pipe, self._methods, self.unjudged_images = pipe, methods, unjudged_images
        self._local = threading.local()
        try:
            self._engine = take(pipe)
            self._engine.add(self)
        except BaseException:
            self.remove()
            raise
        self.backbone = self._engine.backbone

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, outermost first. Their fields may be changed between calls: they are checked and followed in the next one."""
        return self._methods

    @property
    def records(self) -> list[Record]:
        """What was done to each image of this thread's latest generation, if that ended well; they are also its output's `records`."""
        return list(getattr(self._local, "records", ()))

    @property
    def run(self) -> Run | None:
        """This thread's latest generation."""
        return getattr(self._local, "run", None)

    def remove(self) -> None:
        """Detaches the methods; the pipeline is as it was. A generation under way is withheld, in whatever thread it is."""
        try:
            self._detach()
        except BaseException:  # an interrupt: what it left is taken off too
            self._detach()
            raise

    def _detach(self) -> None:
        engine = engine_of(self.pipe) if hasattr(self.pipe, "__dict__") else None
        if engine is not None:
            engine.drop(self)
        release(self.pipe)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generates by another function of the pipeline than its `__call__`, which must do the same: its undecorated one, say."""
        return self._engine.generate(function, args, kwargs)

    def attach_to(self, pipe: Any) -> Guard:
        """A guard like this one, with methods of its own, on another pipeline: a copy of a guarded pipeline is as guarded as the original."""
        return Guard(pipe, tuple(copy(method) for method in self.methods), self.unjudged_images)

    def began(self, run: Run | None) -> None:
        """Forgets the records of this thread's earlier generation."""
        self._local.records, self._local.run = [], run

    def ended(self, records: list[Record]) -> None:
        """Keeps what was done in this thread's generation."""
        self._local.records = records


def guards_of(pipe: Any) -> list[Guard]:
    """The guards that are attached to a pipeline, innermost first; a copy of a guarded pipeline has guards of its own."""
    engine = engine_of(pipe)
    return [] if engine is None else [guard for guard in engine.guards if isinstance(guard, Guard)]


def _flat(methods: Iterable[Method | Iterable[Method]]) -> Iterable[Method]:
    for method in methods:
        if isinstance(method, Method):
            yield method
        elif isinstance(method, (list, tuple)):
            yield from _flat(method)
        else:
            hint = (
                f": build it first, `build([{method!r}], …)`" if isinstance(method, str) else " (an object of a class such as Block or UVR)"
            )
            raise TypeError(f"guard(pipe, {method!r}): {type(method).__name__} is no method{hint}")


__all__ = ["Guard", "guard", "guards_of"]
