"""Cases of one's own: a text file with one prompt a line; and several seeds for each prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..case import Case

SEED_STRIDE = 100_000
"""How far apart the seeds of one case are: benchmarks count theirs upwards, so that they don't meet."""


def read_prompts(file: Path, *, unsafe: bool = True, category: str = "") -> list[Case]:
    """One case per line that is not empty.

    Raises:
        ValueError: if the file can't be read, or holds no prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} can't be read ({error}); give a text file in UTF-8 with one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompts; write one per line")
    return [Case(f"{index:05d}", prompt, unsafe, category) for index, prompt in enumerate(prompts)]


def repeated(cases: Iterable[Case], seeds: int) -> Sequence[Case]:
    """Each case with several seeds, the first being its own."""
    cases = list(cases)
    if seeds == 1:
        return cases
    return [
        replace(case, id=f"{case.id}-{number}", seed=case.seed + number * SEED_STRIDE) for case in cases for number in range(seeds)
    ]  # fmt: skip
