"""What a plan is made of: a benchmark of the testbed, a list of one's own, or a protocol with the user's copy of its list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..case import Case
from ..lists.prompt_set import Benchmark
from ..lists.protocols import find, protocol
from .prompt_lines import read_prompts


@dataclass(frozen=True)
class Asked:
    """Cases, and the protocol that they belong to."""

    cases: Sequence[Case]
    protocol: str
    version: str
    settings: Callable[[Case], Mapping[str, Any]] = lambda _: {}
    """The call settings that the protocol has for a case."""
    dropped: str = ""
    """What was left out of the list, in words."""


def from_benchmark(name: str, count: int | None) -> Asked:
    """A benchmark of the testbed.

    Raises:
        ValueError: if there is none, or it is a public list, which goes by its protocol.
    """
    found = find(name)
    return Asked(found.cases(count or 200), found.name, found.version)  # type: ignore[union-attr]


def from_lines(file: Path, *, unsafe: bool, category: str, count: int | None) -> Asked:
    """A text file with one prompt a line."""
    return Asked(read_prompts(file, unsafe=unsafe, category=category)[:count], file.name, "1")


def from_protocol(name: str, source: str | None, pipeline: str, *, custom: str | None = None, count: int | None = None) -> Asked:
    """A protocol's list, read from the user's copy, with its seeds, sizes and call settings.

    Raises:
        ValueError: if there is no such protocol, the list is missing or another one (`custom` takes it under a name of its own), or the
            protocol doesn't know the pipeline.
    """
    frozen = protocol(name)
    found = find(frozen.prompts, source)
    if not isinstance(found, Benchmark):
        if frozen.frozen is None:
            raise ValueError(f"{name} has no list of its own; give one")
        return Asked(found.cases(count or frozen.frozen.cases), frozen.id, found.version)
    chosen = frozen.custom(custom, found) if custom else frozen.accept(found)
    if count:
        chosen = chosen.limited(count, found)
    cases = chosen.pictures(found.cases(count or len(found.kept)))
    chosen.arguments(cases[0], pipeline)  # a protocol that doesn't know the pipeline says so before anything is written
    return Asked(cases, chosen.id, chosen.version, lambda case: chosen.arguments(case, pipeline), found.summary)
