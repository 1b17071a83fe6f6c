"""The hyper-parameters of an attached method, followed when somebody changes them between calls."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from .method import Method
from .schema import check


@dataclass
class Settings:
    """A method as it was attached, and a working version of it with all that is derived from its fields."""

    method: Method
    working: Method
    values: dict[str, Any]

    @classmethod
    def of(cls, method: Method) -> Settings:
        """Checks the method's fields, and those of its parts.

        Raises:
            ValueError: naming the field, the value and the range.
        """
        _check(method)
        return cls(method, method, _values(method))

    def refresh(self) -> bool:
        """Follows changes since the last look; whether there were any.

        Raises:
            ValueError: if a value is out of range now.
        """
        _check(self.method)
        now = _values(self.method)
        changed = any(now[name] is not value and not _equal(now[name], value) for name, value in self.values.items())
        if changed:  # made anew, so that what was derived from the old values goes
            self.working, self.values = replace(self.method), now  # type: ignore[type-var]
        return changed

    def fresh(self) -> Method:
        """A copy for one generation."""
        return copy(self.working)


def _check(method: Method) -> None:
    if is_dataclass(method):
        check(method)


def _values(method: Method) -> dict[str, Any]:
    return {one.name: getattr(method, one.name) for one in fields(method) if one.init} if is_dataclass(method) else {}


def _equal(left: Any, right: Any) -> bool:
    """Whether two values of plain types are equal; others are equal only if they are the same object."""
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(a is b or _equal(a, b) for a, b in zip(left, right, strict=True))
    plain = (bool, int, float, str)
    return isinstance(left, plain) and isinstance(right, plain) and left == right


__all__ = ["Settings"]
