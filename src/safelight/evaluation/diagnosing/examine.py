"""A run case by case: what the judges saw of each, how categories differ, and what is wrong with the guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...testbed.judges import Classifier, Sight
from ..case import Case, Estimate, Outcome
from ..metrics import safety
from ..runs.generate import read_picture
from .diagnosis import diagnose
from .evidence import Evidence, gather
from .judged import by_group, judged, write_judged

Sights = Mapping[str, Sequence[Sequence[Sight]]]
"""Judge -> what it sees in the unguarded and in the guarded pictures of the unsafe part."""
BREAKDOWN = ("unsafe_rate_base", "unsafe_rate", "erase_rate", "retention")


class Part(Protocol):
    """One benchmark of a run, as `evaluate` makes it."""

    @property
    def out(self) -> Path:
        """The part's folder."""
        ...

    @property
    def cases(self) -> Sequence[Case]:
        """Its cases."""
        ...

    @property
    def outcomes(self) -> Mapping[str, Sequence[Outcome]]:
        """The outcomes by arm, in the order of the cases."""
        ...


def examine(parts: Mapping[str, Part], sights: Sights, classifier: Classifier, metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    """`categories` and `diagnosis` for `results.json`; writes `judged.jsonl` into each part's folder."""
    main = parts["unsafe"]
    seen = {judge: {arm: _unsafe(main.cases, looked) for arm, looked in zip(("base", "guard"), pair)} for judge, pair in sights.items()}
    for name, part in parts.items():
        write_judged(part.out, part.cases, judged(part.cases, seen if name == "unsafe" else {}))
    evidence = {name: _evidence(part, classifier, None if name != "unsafe" else sights) for name, part in parts.items()}
    categories = by_group(main.cases, lambda chosen: _figures(main.cases, sights, chosen))
    return {
        "categories": {group: {name: value.to_json() for name, value in found.items()} for group, found in categories.items()},
        "diagnosis": diagnose(evidence, metrics),
    }


def _unsafe(cases: Sequence[Case], sights: Sequence[Sight]) -> list[bool]:
    return [case.unsafe and safety.shows_unsafe(case, sight) for case, sight in zip(cases, sights, strict=True)]


def _figures(cases: Sequence[Case], sights: Sights, chosen: Sequence[int]) -> dict[str, Estimate]:
    """The judged figures of some cases, by the judge that thinks least of the guard."""
    some = [cases[index] for index in chosen]
    per_judge = {}
    for judge, pair in sights.items():
        base, guarded = ([looked[index] for index in chosen] for looked in pair)
        per_judge[judge] = {
            "unsafe_rate_base": safety.unsafe_rate(some, base),
            "unsafe_rate": safety.unsafe_rate(some, guarded),
            "erase_rate": safety.erase_rate(some, base, guarded),
            "retention": safety.retention(some, base, guarded),
        }
    return {name: safety.least_favourable(per_judge, name) for name in BREAKDOWN}


def _evidence(part: Part, classifier: Classifier, sights: Sights | None) -> Evidence:
    """Of the cases that ask for something unsafe, where judges have looked; else of all."""
    chosen = [index for index, case in enumerate(part.cases) if sights is None or case.unsafe]
    arms = {arm: [part.outcomes[arm][index] for index in chosen] for arm in ("base", "guard")}
    pictures = [[read_picture(part.out, outcome) for outcome in outcomes] for outcomes in arms.values()]
    features = classifier.features(pictures[0]), classifier.features(pictures[1])
    if sights is None:
        return gather(arms["base"], arms["guard"], pictures, features)
    unsafe = np.any([_unsafe(part.cases, guarded) for _, guarded in sights.values()], axis=0)[chosen].tolist()
    lost = np.max([[_lost(part.cases[index], base[index], after[index]) for index in chosen] for base, after in sights.values()], axis=0)
    return gather(arms["base"], arms["guard"], pictures, features, unsafe, lost.tolist())


def _lost(case: Case, base: Sight, guarded: Sight) -> float:
    kept = safety.kept(case, base, guarded)
    return 1 - sum(kept) / len(kept) if kept else 0.0
