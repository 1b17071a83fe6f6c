"""Wrapping bound methods, and undoing it in any order."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

from safelight.errors import SafetyBypassed
from safelight.wrapping import ForeignWrapperWarning, Seam, seam


class Bell:
    def ring(self, times: int = 1, *, loud: bool = False) -> str:
        return ("DING" if loud else "ding") * times


class Guard:
    """Somebody who generates since some time, or doesn't."""

    def __init__(self, began: int | None = 0) -> None:
        self.began = began

    def since(self) -> int | None:
        return self.began


def twice(original: Any, *args: Any, **kwargs: Any) -> str:
    return f"{original(*args, **kwargs)}, {original(*args, **kwargs)}"


def refuse(original: Any, *args: Any, **kwargs: Any) -> str:
    raise SafetyBypassed("outside")


def test_a_seam_keeps_the_signature_and_goes_without_a_trace() -> None:
    bell, guard, signature = Bell(), Guard(), inspect.signature(Bell().ring)
    seam(bell, "ring").add(guard, twice)
    assert inspect.signature(bell.ring) == signature
    assert bell.ring(loud=True) == "DING, DING"
    seam(bell, "ring").drop(guard)
    assert vars(bell) == {}
    assert bell.ring() == "ding"


def test_a_seam_puts_back_what_the_instance_had() -> None:
    bell, guard = Bell(), Guard()
    bell.ring = own = lambda: "dong"  # type: ignore[method-assign,assignment]
    seam(bell, "ring").add(guard, twice)
    assert bell.ring() == "dong, dong"
    seam(bell, "ring").drop(guard)
    assert bell.ring is own


@pytest.mark.parametrize("first", [0, 1])
def test_handlers_come_off_in_any_order(first: int) -> None:
    bell, guards = Bell(), [Guard(), Guard(None)]
    for guard in guards:
        seam(bell, "ring").add(guard, twice)
    seam(bell, "ring").drop(guards[first])
    assert bell.ring() == ("ding, ding" if first == 1 else "ding"), "the one that is left handles the call, if it generates"
    seam(bell, "ring").drop(guards[1 - first])
    assert vars(bell) == {}


def test_a_call_belongs_to_who_generates_and_the_innermost_of_them() -> None:
    bell, outer, inner = Bell(), Guard(1), Guard(2)
    seam(bell, "ring").add(outer, lambda original: "outer", refuse)
    seam(bell, "ring").add(inner, lambda original: "inner", refuse)
    assert bell.ring() == "inner"
    inner.began = None
    assert bell.ring() == "outer"
    outer.began = None
    with pytest.raises(SafetyBypassed, match="outside"):
        bell.ring()


def test_a_foreign_wrapper_is_reported_and_kept() -> None:
    bell, guard = Bell(), Guard()
    there = seam(bell, "ring")
    there.add(guard, twice)
    bell.ring = foreign = lambda: f"[{there()}]"  # type: ignore[method-assign,assignment]
    with pytest.warns(ForeignWrapperWarning, match=r"Bell\.ring was replaced after the guard was attached"):
        there.drop(guard)
    assert bell.ring is foreign
    assert bell.ring() == "[ding]"


def test_a_copy_calls_its_own_function() -> None:
    bell, guard = Bell(), Guard()
    seam(bell, "ring").add(guard, twice)
    clone = copy.deepcopy(bell)
    assert not isinstance(clone.ring, Seam)
    assert clone.ring.__self__ is clone
    seam(bell, "ring").part_of_a_pipeline = True
    with pytest.raises(SafetyBypassed, match="can't be copied alone"):
        copy.deepcopy(bell)
    with pytest.raises(SafetyBypassed, match="can't be pickled"):
        pickle.dumps(bell)
