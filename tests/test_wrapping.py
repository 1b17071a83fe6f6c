"""Wrapping bound methods, and undoing it."""

from __future__ import annotations

import inspect
import threading
from contextlib import ExitStack
from typing import Any

import pytest

from safelight.wrapping import ForeignWrapperWarning, Turnstile, wrap


class Bell:
    def ring(self, times: int = 1, *, loud: bool = False) -> str:
        return ("DING" if loud else "ding") * times


def twice(original: Any, *args: Any, **kwargs: Any) -> str:
    return f"{original(*args, **kwargs)}, {original(*args, **kwargs)}"


def test_a_wrapper_keeps_the_signature_and_goes_without_a_trace() -> None:
    bell, signature = Bell(), inspect.signature(Bell().ring)
    with ExitStack() as stack:
        wrap(stack, bell, "ring", twice)
        assert inspect.signature(bell.ring) == signature
        assert bell.ring(loud=True) == "DING, DING"
    assert vars(bell) == {}
    assert bell.ring() == "ding"


def test_a_wrapper_puts_back_what_the_instance_had() -> None:
    bell = Bell()
    bell.ring = own = lambda: "dong"  # type: ignore[method-assign,assignment]
    with ExitStack() as stack:
        wrap(stack, bell, "ring", twice)
        assert bell.ring() == "dong, dong"
    assert bell.ring is own


def test_wrappers_nest() -> None:
    bell = Bell()
    with ExitStack() as stack:
        wrap(stack, bell, "ring", twice)
        wrap(stack, bell, "ring", lambda original: f"({original()})")
        assert bell.ring() == "(ding, ding)"
    assert vars(bell) == {}


def test_a_foreign_wrapper_is_reported_and_kept() -> None:
    bell, stack = Bell(), ExitStack()
    wrap(stack, bell, "ring", twice)
    inner = bell.ring
    bell.ring = foreign = lambda: f"[{inner()}]"  # type: ignore[method-assign,assignment]
    with pytest.warns(ForeignWrapperWarning, match=r"Bell\.ring was replaced after the guard was attached"):
        stack.close()
    assert bell.ring is foreign
    assert bell.ring() == "[ding]"


class Pipe:
    def __call__(self, turnstile: Turnstile) -> bool:
        return turnstile._inside(threading.get_ident())


def test_the_turnstile_sees_who_is_inside() -> None:
    pipe = Pipe()
    turnstile = Turnstile(pipe)
    assert pipe(turnstile)
    assert not turnstile._inside(threading.get_ident())
    turnstile.enter()
    turnstile.enter()  # the same thread may: its earlier generation failed
    turnstile.leave()
