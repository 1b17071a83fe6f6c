"""A run, read back from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArtefactError
from ..case import Estimate, Outcome
from ..diagnosing.judged import Judged, read_judged
from ..diagnosing.strength import estimate, settings_of
from ..runs.generate import read_outcomes


@dataclass(frozen=True)
class Pair:
    """One prompt's pictures."""

    judged: Judged
    base: Outcome
    guard: Outcome
    source: Path | None
    """The picture that an edit starts from."""

    @property
    def record(self) -> dict[str, Any]:
        """What the guard did."""
        return self.guard.record or {}

    @property
    def flagged(self) -> bool:
        """Whether the guard found the request unsafe."""
        return bool(self.record.get("flagged"))

    @property
    def identical(self) -> bool:
        """Whether both pictures are the same, bit by bit."""
        return self.base.sha256 == self.guard.sha256

    def unsafe(self, arm: str) -> list[str]:
        """The judges that see something unsafe."""
        return [judge for judge, arms in self.judged.seen.items() if arms.get(arm)]


@dataclass(frozen=True)
class RunFolder:
    """The results of a run with its pictures."""

    folder: Path
    results: Mapping[str, Any]
    parts: Mapping[str, Sequence[Pair]] = field(repr=False)

    @property
    def metrics(self) -> dict[str, Estimate]:
        """The headline figures."""
        return figures(self.results["metrics"])

    @property
    def judges(self) -> dict[str, dict[str, Estimate]]:
        """The judged figures, judge by judge."""
        return {judge: figures(found) for judge, found in self.results.get("judges", {}).items()}

    @property
    def categories(self) -> dict[str, dict[str, Estimate]]:
        """The judged figures, category by category."""
        return {name: figures(found) for name, found in self.results.get("categories", {}).items()}

    @property
    def real(self) -> bool:
        """Whether its pictures may be of a kind that nobody should meet unprepared: all but the testbed's."""
        return not str(self.results.get("protocol", "")).startswith("testbed")

    @property
    def words(self) -> list[str]:
        """What it is: guard, settings and pipeline."""
        guard = str(self.results.get("guard") or self.folder.resolve().name)
        given = [f"{name.removeprefix(guard + '.')}={value}" for name, value in settings_of(self.results).items()]
        return [guard, *given, *([f"on {self.results['pipeline']}"] if self.results.get("pipeline") else [])]

    @property
    def name(self) -> str:
        """What a page calls it."""
        return ", ".join(self.words).replace(", on ", " on ")


def short_names(runs: Sequence[RunFolder]) -> tuple[str, list[str]]:
    """What runs have in common, and what each is called beside the others; its folder's name where nothing else tells it from them."""
    common = [word for word in runs[0].words if all(word in run.words for run in runs)]
    own = [", ".join(word for word in run.words if word not in common).replace(", on ", " on ") for run in runs]
    names = [
        name if name and own.count(name) == 1 else " ".join([name, run.folder.resolve().name]).strip()
        for name, run in zip(own, runs, strict=True)
    ]
    return ", ".join(common).replace(", on ", " on "), names


def figures(found: Mapping[str, Any]) -> dict[str, Estimate]:
    """Figures of `results.json` as estimates; null is not a number."""
    return {name: estimate(one) for name, one in found.items()}


def read_run(folder: Path) -> RunFolder:
    """Reads a run.

    Raises:
        ArtefactError: if the folder holds no finished run, or a damaged one.
    """
    file = folder / "results.json"
    if not file.is_file():
        unfinished = (folder / "run.json").is_file()
        raise ArtefactError(
            f"{folder} holds {'a run that is not finished' if unfinished else 'no run'}; "
            f"{'run the same command again to finish it' if unfinished else 'give the folder that `safelight evaluate --out` wrote'}"
        )
    try:
        results = json.loads(file.read_text())
        figures(results["metrics"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{file} is no results file ({type(error).__name__}: {error}); run the same evaluation again to write it anew"
        ) from error
    parts = {outcomes.parent.name: _pairs(outcomes.parent) for outcomes in sorted(folder.glob("*/outcomes.jsonl"))}
    first = [name for name in ("unsafe", "benign", "proximal") if name in parts]
    return RunFolder(folder, results, {name: parts[name] for name in (*first, *(name for name in parts if name not in first))})


def _pairs(out: Path) -> list[Pair]:
    """The pictures of a part that were made both ways, in the order in which they were asked for."""
    judged = read_judged(out)
    by_arm: dict[str, dict[str, Outcome]] = {}
    for outcome in read_outcomes(out):
        by_arm.setdefault(outcome.arm, {})[outcome.case] = outcome
    base, guard = by_arm.get("base", {}), by_arm.get("guard", {})
    return [_pair(out, judged, base[case], outcome) for case, outcome in guard.items() if case in base]


def _pair(out: Path, judged: Mapping[str, Judged], base: Outcome, guard: Outcome) -> Pair:
    told = judged.get(base.case) or Judged(base.case, str((guard.record or {}).get("prompt") or ""), out.name == "unsafe", None)
    source = out / "images" / "source" / f"{base.case}.png"
    return Pair(told, base, guard, source if source.is_file() else None)
