"""One run, laid out for its page: tables of figures with their plots, pictures, findings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..case import Estimate
from ..metrics.estimates import rate
from .cards import Grid, grid, seeds
from .charts import Axis, Mark, axis, mark
from .labels import LABELS, Label, interval, label, written
from .run_folder import RunFolder

UNDEFINED = Estimate(math.nan, math.nan, math.nan, 0)
JUDGED = ("unsafe_rate_base", "unsafe_rate", "erase_rate", "retention", "sadi")


@dataclass(frozen=True)
class Cell:
    """A figure in a table: its plot and its words."""

    marks: Sequence[Mark]
    value: str
    interval: str
    n: int
    before: str = ""
    """The unguarded figure, in words, where there is one."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: Label
    cells: Sequence[Cell]
    axis: Axis

    @property
    def marks(self) -> list[Mark | None]:
        """The cells' own marks; none where a figure is undefined."""
        return [one.marks[-1] if one.marks else None for one in self.cells]


@dataclass(frozen=True)
class RunPage:
    """All that the template needs of one run."""

    run: RunFolder
    name: str
    hero: Sequence[tuple[str, str, str]]
    """A few large figures: value, what it is, interval."""
    groups: Mapping[str, Sequence[Row]]
    judges: Sequence[Row]
    judge_names: Sequence[str]
    agreement: Mapping[str, Cell]
    direction: str
    categories: Sequence[tuple[str, Sequence[Mark], Sequence[Cell]]]
    """Name, marks of the unsafe rates, and figures."""
    category_axis: Axis
    findings: Sequence[Mapping[str, Any]]
    not_assessed: Mapping[str, str]
    diagnosed: bool
    grids: Mapping[str, Grid]
    seconds: Mapping[str, Mapping[str, float]]
    seeds: Mapping[str, str | None]


def run_page(run: RunFolder, pictures: int) -> RunPage:
    """Everything of one run, laid out."""
    diagnosis = run.results.get("diagnosis")
    everything = [one for found in run.categories.values() for one in found.values()]
    shared = axis(everything, True)
    return RunPage(
        run, run.name, hero(run), headline(run), judge_rows(run), list(run.judges), agreement(run), direction(run),
        [_category(name, found, shared) for name, found in run.categories.items()], shared,
        (diagnosis or {}).get("findings", ()), (diagnosis or {}).get("not_assessed", {}), diagnosis is not None,
        {part: grid(run, part, pictures) for part in run.parts},
        {part: _seconds(run, part) for part in run.parts if run.parts[part]},
        {part: seeds(pairs) for part, pairs in run.parts.items()},
    )  # fmt: skip


HERO = {"unsafe_rate": "of unsafe prompts are unsafe", "retention": "of their harmless content kept", "untouched": "harmless prompts untouched",
        "over_refusal": "harmless prompts flagged", "overhead_unsafe": "times the seconds, unsafe prompts"}  # fmt: skip


def hero(run: RunFolder) -> list[tuple[str, str, str]]:
    """The figures that people ask for first."""
    found, told = run.metrics, []
    for name, meaning in HERO.items():
        if name in found:
            share, base = label(name).share, found.get(f"{name}_base")
            before = f"{written(base, share)} → " if base else ""
            told.append((before + written(found[name], share), meaning, interval(found[name], share)))
    return told


def _category(name: str, found: Mapping[str, Estimate], on: Axis) -> tuple[str, list[Mark], list[Cell]]:
    cells = [cell(found.get(key, UNDEFINED), on, kind="base" if key.endswith("_base") else "guard") for key in JUDGED[:4]]
    return name, [one for two in cells[:2] for one in two.marks], cells


def cell(figure: Estimate, on: Axis, base: Estimate | None = None, kind: str = "guard", title: str = "") -> Cell:
    """A figure with its mark, and the unguarded one beside it."""
    marks = [mark(base, on, "base", "unguarded") if base else None, mark(figure, on, kind, title)]
    before = f"unguarded {written(base, on.share)} ({interval(base, on.share)})" if base else ""
    return Cell([one for one in marks if one], written(figure, on.share), interval(figure, on.share), figure.n, before)


def headline(run: RunFolder) -> dict[str, list[Row]]:
    """The run's figures by group: those of shares on one axis, the others each on their own."""
    found = run.metrics
    names = [name for name in (*LABELS, *found) if name in found and name != "sadi_s" and not name.endswith("_base")]
    shares = axis([found[name] for name in names if label(name).share], True)
    groups: dict[str, list[Row]] = {"Safety": [], "Fidelity": [], "Cost": []}
    for name in dict.fromkeys(names):
        told, figure = label(name), found[name]
        base = found.get(f"{name}_base")
        own = shares if told.share else axis([figure], False, through=(1.0,) if name.startswith("overhead") else (0.0,))
        groups[told.group].append(Row(told, [cell(figure, own, base)], own))
    return {group: rows for group, rows in groups.items() if rows}


def judge_rows(run: RunFolder) -> list[Row]:
    """Each judged figure, judge by judge, on one axis."""
    judges = run.judges
    names = [name for name in JUDGED if all(name in found for found in judges.values())] if judges else []
    shared = axis([found[name] for found in judges.values() for name in names], True)
    return [
        Row(
            label(name),
            [cell(found[name], shared, kind=f"s{index}", title=judge) for index, (judge, found) in enumerate(judges.items())],
            shared,
        )
        for name in names
    ]


def agreement(run: RunFolder) -> dict[str, Cell]:
    """Share of the unsafe part's pictures on which all judges say the same, by arm."""
    pairs = [pair for pair in run.parts.get("unsafe", ()) if len(pair.judged.seen) > 1]
    told = {arm: [len({seen[arm] for seen in pair.judged.seen.values()}) == 1 for pair in pairs] for arm in ("base", "guard")}
    return {arm: cell(rate(same), Axis(0, 1)) for arm, same in told.items() if same}


def direction(run: RunFolder) -> str:
    """Whether all judges agree that the guard makes fewer, or more, pictures unsafe."""
    changes = {}
    for judge, found in run.judges.items():
        if {"unsafe_rate", "unsafe_rate_base"} <= set(found):
            change = found["unsafe_rate"].value - found["unsafe_rate_base"].value
            changes[judge] = "fewer" if change < 0 else "more" if change > 0 else "as many"
    if len(changes) < 2:
        return ""
    if len(set(changes.values())) == 1:
        return f"All judges see {next(iter(changes.values()))} unsafe pictures with the guard: they agree in direction."
    return "Judges disagree in direction: " + ", ".join(f"{judge} sees {change} unsafe pictures" for judge, change in changes.items()) + "."


def comparison(runs: Sequence[RunFolder]) -> list[Row]:
    """Each headline figure, run by run, on one axis."""
    found = [run.metrics for run in runs]
    names = [name for name in LABELS if any(name in metrics for metrics in found) and name != "sadi_s"]
    rows = []
    for name in names:
        told, each = label(name), [metrics.get(name, UNDEFINED) for metrics in found]
        own = axis(each, told.share, through=(1.0,) if name.startswith("overhead") else (0.0,))
        rows.append(Row(told, [cell(figure, own, kind=f"s{index}") for index, figure in enumerate(each)], own))
    return rows


def _seconds(run: RunFolder, part: str) -> dict[str, float]:
    """Median seconds per picture, by arm."""
    return {arm: median(getattr(pair, arm).seconds for pair in run.parts[part]) for arm in ("base", "guard")}
