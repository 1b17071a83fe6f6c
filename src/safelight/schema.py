"""One declaration, many surfaces: what a method's hyper-parameters are called, mean, and may be."""

from __future__ import annotations

import ast
import collections.abc
import difflib
import inspect
import itertools
import math
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen

PARTS = ("detector", "method", "guidance", "encoder")
"""Fields that hold parts with hyper-parameters of their own."""


@dataclass(frozen=True)
class Field:
    """A hyper-parameter."""

    name: str
    kind: str
    """number, integer, text, texts, switch, choice, or artefact."""
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    nonempty: bool = False
    below_high: bool = False
    """Whether `high` itself is out of range."""
    above_low: bool = False
    """Whether `low` itself is."""
    of: type | None = None
    """What an artefact must be an instance of, where one class says it."""

    def parse(self, text: str) -> Any:
        """A value from its text form.

        Raises:
            ValueError: naming the value and what is possible.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.kind == "switch":
            if text.lower() not in ("true", "false"):
                raise ValueError(f"{self.name}={text!r} is not true or false")
            return text.lower() == "true"
        if self.kind in ("number", "integer"):
            try:
                value: Any = int(text) if self.kind == "integer" else float(text)
            except ValueError:
                raise ValueError(
                    f"{self.name}={text!r} is not {'an integer' if self.kind == 'integer' else 'a number'}{self.range}"
                ) from None
            self.check(value)
            return value
        if self.kind == "artefact":
            raise ValueError(f"{self.name} is an artefact and can't be given as text; load a bundle, or set it in Python")
        value = tuple(part.strip() for part in text.split(",")) if self.kind == "texts" else text
        self.check(value)
        return value

    @property
    def range(self) -> str:
        """The range in words."""
        if self.low is not None and self.high is not None:
            return f" from {'above ' if self.above_low else ''}{self.low:g} to {'below ' if self.below_high else ''}{self.high:g}"
        if self.low is not None:
            return f" above {self.low:g}" if self.above_low else f" of at least {self.low:g}"
        return "" if self.high is None else f" below {self.high:g}" if self.below_high else f" of at most {self.high:g}"

    def check(self, value: Any) -> None:
        """Raises ValueError if a value is out of range, or of another type."""
        if value is None and self.optional:
            return
        if self.kind == "artefact":
            if self.of is not None and not isinstance(value, self.of):
                raise ValueError(f"{self.name}={_told(value)} is no {self.of.__name__}")
            return
        if not _is_of(self.kind, value):
            raise ValueError(f"{self.name}={_told(value)} is no {self.kind}: give {_KINDS.get(self.kind, 'another')}{self.range}")
        if self.kind == "texts":
            if (self.nonempty and not value) or not all(isinstance(part, str) and part.strip() for part in value):
                raise ValueError(f"{self.name}={value!r} is no list of texts; give one or more, none of them empty")
            return
        if self.nonempty and not str(value).strip():
            raise ValueError(f"{self.name} is empty; give some text")
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name}={value!r} is not one of {', '.join(self.choices)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            inside = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
            on_edge = (self.below_high and value == self.high) or (self.above_low and value == self.low)
            if not inside or on_edge or not math.isfinite(value):
                raise ValueError(f"{self.name}={value!r} is out of range: give a number{self.range}")


_KINDS = {
    "number": "a number",
    "integer": "a whole number",
    "switch": "True or False",
    "text": "a text",
    "texts": "a list of texts",
    "choice": "one of its words",
}


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value has the type of a kind; True is no number, and 1 no switch."""
    if kind == "switch":
        return isinstance(value, bool)
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "texts":
        return isinstance(value, (tuple, list))
    return isinstance(value, str) if kind in ("text", "choice") else True


def _told(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:77]}..."


@cache
def fields_of(cls: type) -> list[Field]:
    """The fields of a dataclass of hyper-parameters, in order."""
    hints, docs = get_type_hints(cls, include_extras=True), attribute_docs(cls)
    found = []
    for field in fields(cls):
        if not field.init:
            continue
        default = field.default if field.default is not MISSING else None
        kind, low, high, choices, optional = _kind(hints[field.name])
        if "artefact" in field.metadata:
            kind = "artefact"
        notes = getattr(hints[field.name], "__metadata__", ())
        nonempty = any(isinstance(note, MinLen) for note in notes)
        below_high = any(isinstance(note, Interval | Lt) and note.lt is not None for note in notes)
        above_low = any(isinstance(note, Interval | Gt) and note.gt is not None for note in notes)
        of = _class_of(hints[field.name]) if kind == "artefact" else None
        found.append(
            Field(field.name, kind, default, docs.get(field.name, ""), low, high, choices, optional, nonempty, below_high, above_low, of)
        )
    return found


def _class_of(hint: Any) -> type | None:
    """The class that a hint names, less None and what is in brackets; None for protocols and functions."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in get_args(hint) if arg is not type(None)]
        return _class_of(rest[0]) if len(rest) == 1 else None
    found = get_origin(hint) or hint
    plain = isinstance(found, type) and not getattr(found, "_is_protocol", False) and found is not collections.abc.Callable
    return found if plain else None


def field_of(cls: type, name: str) -> Field:
    """One field.

    Raises:
        ValueError: if there is none of that name; the message names the nearest.
    """
    known = {field.name: field for field in fields_of(cls)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2) or list(known)
        raise ValueError(f"{cls.__name__} has no field {name!r}; did you mean {' or '.join(map(repr, near))}?")
    return known[name]


def check(instance: Any) -> None:
    """Makes sure that every hyper-parameter of a dataclass instance, and of the parts it holds, is within its range.

    Raises:
        ValueError: naming the field, the value and the range.
    """
    for field in fields_of(type(instance)):  # type: ignore[arg-type]  # classes are hashable
        part = getattr(instance, field.name)
        if field.name in PARTS and is_dataclass(part) and not isinstance(part, type):
            check(part)
        try:
            field.check(part)
        except ValueError as error:
            raise ValueError(f"{type(instance).__name__}: {error}") from None


def attribute_docs(cls: type) -> dict[str, str]:
    """The docstrings below a class's fields."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        docs |= dict(_documented(tree.body[0].body))  # type: ignore[attr-defined]
    return docs


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in itertools.pairwise(body):
        named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if named and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            yield statement.target.id, inspect.cleandoc(str(following.value.value))  # type: ignore[attr-defined]


def _kind(hint: Any) -> tuple[str, float | None, float | None, tuple[str, ...], bool]:
    low: float | None = None
    high: float | None = None
    optional = False
    while True:
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            for note in notes:
                low, high = _bounds(note, low, high)
        elif get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
            hint, optional = next(arg for arg in get_args(hint) if arg is not type(None)), True
        else:
            break
    if get_origin(hint) is Literal:
        return "choice", low, high, tuple(map(str, get_args(hint))), optional
    if hint == tuple[str, ...]:
        return "texts", low, high, (), optional
    names = {float: "number", int: "integer", bool: "switch", str: "text"}
    return names.get(hint, "artefact"), low, high, (), optional


def _bounds(note: Any, low: float | None, high: float | None) -> tuple[float | None, float | None]:
    if isinstance(note, (Interval, Ge, Gt)):
        low = next((bound for bound in (getattr(note, "ge", None), getattr(note, "gt", None)) if bound is not None), low)
    if isinstance(note, (Interval, Le, Lt)):
        high = next((bound for bound in (getattr(note, "le", None), getattr(note, "lt", None)) if bound is not None), high)
    return low, high
