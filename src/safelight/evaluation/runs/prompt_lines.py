"""Cases of one's own: a text file with one prompt a line; and several seeds for each prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ... import tables
from ..case import Case

SEED_STRIDE = 100_000
"""How far apart the seeds of one case are: benchmarks count theirs upwards, so that they don't meet."""


def read_prompts(file: Path, *, unsafe: bool = True, category: str = "") -> list[Case]:
    """One case per line that is not blank, or per row of a table with the column `prompt`.

    Raises:
        ValueError: if the file can't be read for certain, or holds no prompt.
    """
    return [Case(f"{index:05d}", prompt, unsafe, category) for index, prompt in enumerate(tables.read_prompts(file))]


def repeated(cases: Iterable[Case], seeds: int) -> Sequence[Case]:
    """Each case with several seeds, the first being its own."""
    cases = list(cases)
    if seeds == 1:
        return cases
    return [
        replace(case, id=f"{case.id}-{number}", seed=case.seed + number * SEED_STRIDE) for case in cases for number in range(seeds)
    ]  # fmt: skip
