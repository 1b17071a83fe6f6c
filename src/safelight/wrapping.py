"""Wrapping bound methods on one instance, and undoing it."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


class ForeignWrapperWarning(UserWarning):
    """Somebody wrapped a function after the guard did; the guard steps aside but can't take its wrapper out."""


def wrap(stack: ExitStack, owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replaces a bound method on one instance by `around(original, *args, **kwargs)`; `stack` puts it back.

    The wrapper keeps the signature, which pipelines inspect. If it was itself wrapped by the time `stack` unwinds, it stays where
    it is, calls the original, and a warning says so.

    Returns:
        A function that puts the wrapper on again, should somebody have restored what was there before it.
    """
    original = getattr(owner, name)
    before = vars(owner).get(name)
    attached = True

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs) if attached else original(*args, **kwargs)

    def undo() -> None:
        nonlocal attached
        attached = False
        if vars(owner).get(name) is not wrapper:
            warnings.warn(
                f"{type(owner).__name__}.{name} was replaced after the guard was attached; the guard is inactive now, but its "
                "empty wrapper stays until the other one is removed",
                ForeignWrapperWarning,
                stacklevel=2,
            )
        elif before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    def renew() -> None:
        nonlocal original, before
        current = getattr(owner, name)
        if not _contains(current, wrapper):
            original, before = current, vars(owner).get(name)
            setattr(owner, name, wrapper)

    setattr(owner, name, wrapper)
    stack.callback(undo)
    return renew


def _contains(function: Any, wrapper: Callable[..., Any]) -> bool:
    """Whether a function is the wrapper, or was wrapped around it (with `functools.wraps`)."""
    while function is not None:
        if function is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


class Turnstile:
    """Lets one generation at a time into a pipeline, whose scheduler holds state.

    A generation announces its beginning and its end, but not its death by an exception. So a thread that waits looks whether the
    owner is still inside the pipeline; if not, the place is free.
    """

    def __init__(self, pipe: Any) -> None:
        self._code = inspect.unwrap(type(pipe).__call__).__code__
        self._owner: int | None = None
        self._mutex = threading.Lock()

    def enter(self, poll: float = 0.02) -> None:
        """Waits until no other thread is generating."""
        while True:
            with self._mutex:
                if self._owner in (None, threading.get_ident()) or not self._inside(self._owner):
                    self._owner = threading.get_ident()
                    return
            time.sleep(poll)

    def leave(self) -> None:
        """Lets the next one in."""
        with self._mutex:
            self._owner = None

    def _inside(self, thread: int | None) -> bool:
        frame = sys._current_frames().get(thread or 0)
        while frame is not None:
            if frame.f_code is self._code:
                return True
            frame = frame.f_back
        return False
