"""The folder is the registry: a name -> the class in the file of that name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Generic, TypeVar

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Registry(Generic[Kind]):
    """Resolves names to the classes of a catalogue folder, then to the entry points of the same group."""

    package: str
    base: type[Kind]

    def names(self) -> list[str]:
        """All names, without importing anything but the package itself."""
        folder = importlib.import_module(self.package)
        own = [module.name for module in pkgutil.iter_modules(folder.__path__)]
        return sorted({*own, *(point.name for point in entry_points(group=self.package))})

    def __getitem__(self, name: str) -> type[Kind]:
        """The class of that name.

        Raises:
            ValueError: if there is none; the message names the nearest ones.
        """
        for point in entry_points(group=self.package):
            if point.name == name:
                return point.load()  # type: ignore[no-any-return]
        if name not in self.names():
            near = difflib.get_close_matches(name, self.names(), n=3) or self.names()
            raise ValueError(f"there is no {name!r} in {self.package}; did you mean {' or '.join(map(repr, near))}?")
        module = importlib.import_module(f"{self.package}.{name}")
        found = [value for value in vars(module).values() if self._defines(value, module.__name__)]
        assert len(found) == 1, f"{module.__name__} must define exactly one {self.base.__name__}"
        return found[0]  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[tuple[str, type[Kind]]]:
        return ((name, self[name]) for name in self.names())

    def _defines(self, value: object, module: str) -> bool:
        return isinstance(value, type) and issubclass(value, self.base) and value.__module__ == module
