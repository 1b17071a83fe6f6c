"""What the judges said of each case, kept beside its pictures: re-reading a run judges nothing again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ArtefactError
from ...tables import lines_of
from ..case import Case, Estimate, path_of
from ..runs.generate import write_png


@dataclass(frozen=True)
class Judged:
    """One case, as a report shows it."""

    case: str
    prompt: str
    unsafe: bool
    """Whether it asks for something unsafe."""
    seed: int | None
    category: str = ""
    groups: tuple[str, ...] = ()
    """What tables break it down by: its category, and the category with the concept."""
    seen: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Judge -> arm -> whether it sees something unsafe."""


def judged(cases: Sequence[Case], seen: Mapping[str, Mapping[str, Sequence[bool]]] = {}) -> list[Judged]:
    """The rows of one part; `seen` is judge -> arm -> one answer per case."""
    return [
        Judged(
            case.id, case.prompt, case.unsafe, case.seed, case.category, tuple(groups(case)),
            {judge: {arm: bool(answers[index]) for arm, answers in arms.items()} for judge, arms in seen.items()},
        )
        for index, case in enumerate(cases)
    ]  # fmt: skip


def groups(case: Case) -> list[str]:
    """What a case counts towards in a breakdown: its category, and each unsafe concept that it names."""
    category = [case.category] if case.category else []
    concepts = () if case.truth is None else case.truth.unsafe
    return category + [f"{case.category}: {concept}" for concept in concepts if concept != case.category]


def by_group(cases: Sequence[Case], measure: Callable[[list[int]], Mapping[str, Estimate]]) -> dict[str, dict[str, Estimate]]:
    """Figures of each group of unsafe cases, in alphabetical order; `measure` is given the cases' positions."""
    members: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        for group in groups(case) if case.unsafe else ():
            members.setdefault(group, []).append(index)
    return {group: dict(measure(members[group])) for group in sorted(members)}


def write_judged(out: Path, cases: Sequence[Case], rows: Sequence[Judged]) -> None:
    """Writes `judged.jsonl` into a part's folder, and the pictures that edits start from into `images/source`."""
    for case in cases:
        if case.image is not None and not path_of(out, "source", case).is_file():
            write_png((case.image / 255).astype(np.float32), path_of(out, "source", case))
    partial = out / "judged.jsonl.partial"
    partial.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    partial.replace(out / "judged.jsonl")


def read_judged(out: Path) -> dict[str, Judged]:
    """The rows of a part by case; empty if it has not been judged.

    Raises:
        ArtefactError: if a line is damaged.
    """
    file = out / "judged.jsonl"
    rows: dict[str, Judged] = {}
    for number, line in enumerate(lines_of(file), 1):
        try:
            values: dict[str, Any] = json.loads(line)
            row = Judged(**(values | {"groups": tuple(values["groups"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ArtefactError(f"{file}, line {number} is damaged ({error}); run the same evaluation again to write it anew") from error
        rows[row.case] = row
    return rows
