"""A whole evaluation: a guard against the unguarded pipeline, on a benchmark and its benign companions."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtefactError
from ..generator import Generator
from ..method import Method
from ..testbed.judges import Classifier, Judge, Sight, judges
from .benchmarks.testbed import TestbedBenchmark, find
from .case import Case, Estimate, Outcome
from .diagnosing.examine import examine
from .judges.testbed_classifier import SceneClassifier
from .judges.testbed_matcher import SceneMatcher
from .metrics import quality, safety
from .metrics.estimates import figure
from .runs.arms import forced_methods
from .runs.durable import only_one
from .runs.fingerprint import versions
from .runs.generate import Arms, generate, read_picture
from .runs.judging import judge_run
from .sights import sight_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each kind."""

    unsafe: int = 200
    benign: int = 100
    proximal: int = 100


@dataclass(frozen=True)
class Part:
    """One benchmark of a run: its cases and their outcomes by arm."""

    out: Path
    cases: Sequence[Case]
    outcomes: Mapping[str, Sequence[Outcome]]

    def pictures(self, arm: str) -> list[Any]:
        """The images of one arm, in the order of the cases."""
        return [read_picture(self.out, outcome) for outcome in self.outcomes[arm]]


def evaluate(
    generator: Generator, methods: Sequence[Method], benchmark: str, out: Path, *,
    sizes: Sizes = Sizes(), batch: int = 8, description: Mapping[str, Any] | None = None, progress: Progress = lambda *_: None,
) -> dict[str, Any]:  # fmt: skip
    """Generates with and without `methods`, judges with both judges, and writes `results.json`.

    Raises:
        ArtefactError: if `out` holds a run of something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    main = find(benchmark)
    if not any(case.unsafe for case in main.cases(sizes.unsafe)):
        raise ValueError(
            f"{benchmark} has no unsafe prompts, so there is nothing to erase; it runs along with testbed/weapons and its like"
        )
    companions = _companions(main)
    identity = {"protocol": f"{main.name}/{main.version}", "sizes": vars(sizes), "batch": batch, **(description or {})}
    with only_one(out):
        _claim(out, identity)
        pipeline = str(identity.get("pipeline", ""))
        run = _Run(generator, out, batch, pipeline, progress)
        parts = {
            "unsafe": run.part("unsafe", main, sizes.unsafe, {"base": (), "guard": methods}),
            "benign": run.part("benign", companions["benign"], sizes.benign, {"base": (), "guard": methods}),
        }
        forced = forced_methods(methods)
        if "proximal" in companions:
            arms: dict[str, Sequence[Method]] = {"base": (), "guard": methods} | ({"forced": forced} if forced else {})
            parts["proximal"] = run.part("proximal", companions["proximal"], sizes.proximal, arms)
        results = identity | report(parts) | {"versions": versions(), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def _companions(main: TestbedBenchmark) -> dict[str, TestbedBenchmark]:
    world = main.name.split("/")[0]
    if "edits" in main.name:
        return {"benign": find(f"{world}/edits-benign")}
    return {kind: find(f"{world}/{kind}") for kind in ("benign", "proximal")}


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Makes sure that a folder holds one run only."""
    file, wanted = out / "run.json", json.dumps(identity, indent=2, sort_keys=True, default=str)
    if file.is_file() and file.read_text() != wanted:
        raise ArtefactError(f"{out} holds a run with other settings (see {file}); choose another folder, or remove this one")
    file.write_text(wanted)


@dataclass(frozen=True)
class _Run:
    """What all parts share."""

    generator: Generator
    out: Path
    batch: int
    pipeline: str
    progress: Progress

    def part(self, name: str, benchmark: TestbedBenchmark, count: int, arms: Arms) -> Part:
        """One benchmark's images: a manifest and its outcomes, as in any run."""
        cases, total, made = benchmark.cases(count), count * len(arms), 0

        def advance(images: int) -> None:
            nonlocal made
            made += images
            self.progress(benchmark.name, made, total)

        self.progress(benchmark.name, 0, total)
        by_arm: dict[str, list[Outcome]] = {arm: [] for arm in arms}
        outcomes = generate(
            self.generator, cases, arms, self.out / name, self.batch, advance,
            pipeline=self.pipeline, protocol=benchmark.name, version=benchmark.version,
        )  # fmt: skip
        for outcome in outcomes:
            by_arm[outcome.arm].append(outcome)
        return Part(self.out / name, cases, by_arm)


def report(parts: Mapping[str, Part]) -> dict[str, Any]:
    """All figures of a run: a pure function of its folder, where it leaves what the judges said of each case as `judged.jsonl`."""
    classifier, matcher = judges()
    changed = _disruptions(parts.get("proximal"), classifier)
    main = parts["unsafe"]
    sights = judged_sights(main, classifier.name, matcher.name)
    per_judge = {judge: _judged(main, base, guarded, changed.get("guard")) for judge, (base, guarded) in sights.items()}
    benign = [part for name, part in parts.items() if name != "unsafe"]
    flagged = [outcome for part in benign for outcome in part.outcomes["guard"]]
    metrics = {name: safety.least_favourable(per_judge, name) for name in per_judge[classifier.name]}
    metrics |= {
        "fsr": safety.forgetting(main.cases, [guarded for _, guarded in sights.values()]),
        "untouched": safety.untouched(parts["benign"].outcomes["base"], parts["benign"].outcomes["guard"]),
        "over_refusal": safety.over_refusal(flagged),
        "overhead_benign": _overhead(parts["benign"]),
        "overhead_unsafe": _overhead(parts["unsafe"]),
    }
    metrics |= {
        name: value for name, value in (("sadi_delta_p", changed.get("guard")), ("sadi_delta_p_forced", changed.get("forced"))) if value
    }
    metrics |= _qualities(parts["benign"], classifier)
    return {
        "n": len(main.cases),
        "metrics": {name: figure(value) for name, value in metrics.items()},
        "judges": {judge: {name: figure(value) for name, value in found.items()} for judge, found in per_judge.items()},
        **examine(parts, sights, classifier, metrics),
        "judge_versions": {judge.name: {"version": judge.version, "threshold": judge.threshold} for judge in (classifier, matcher)},
    }


def judged_sights(part: Part, classifier: str, matcher: str) -> dict[str, list[list[Sight]]]:
    """Judge -> what it sees in the pictures of `base` and `guard`, in the order of the cases: the second pass, kept in `judgements/`.

    Raises:
        ArtefactError: if a picture could not be judged.
    """
    adapters = {"testbed_classifier": classifier, "testbed_matcher": matcher}
    judged = judge_run(part.out, [SceneClassifier(), SceneMatcher()])
    found: dict[str, list[list[Sight]]] = {}
    for adapter, name in adapters.items():
        said = {(one.arm, one.case): one for one in judged[adapter].values()}
        if failed := next((one for one in said.values() if one.judgement is None), None):
            raise ArtefactError(f"{part.out}: {adapter} failed on arm {failed.arm}, case {failed.case}: {failed.error}")
        found[name] = [[sight_of(said[arm, case.id].judgement) for case in part.cases] for arm in ("base", "guard")]  # type: ignore[arg-type]
    return found


def _judged(part: Part, base: Sequence[Sight], guarded: Sequence[Sight], changed: Estimate | None) -> dict[str, Estimate]:
    unsafe = safety.unsafe_rate(part.cases, guarded)
    named = [(case, before, after) for case, before, after in zip(part.cases, base, guarded, strict=True) if case.unsafe]
    kept = safety.retention(*map(list, zip(*named, strict=True)))  # type: ignore[arg-type]
    figures = {
        "unsafe_rate_base": safety.unsafe_rate(part.cases, base),
        "unsafe_rate": unsafe,
        "erase_rate": safety.erase_rate(part.cases, base, guarded),
        "retention": kept,
        "sadi_s": unsafe,
    }
    return figures | ({"sadi": safety.sadi(unsafe, changed)} if changed else {})


def look(judge: Judge, pictures: Sequence[Any]) -> list[Sight]:
    """A judge's sights; equal pictures are looked at once."""
    unique = {np.asarray(picture).tobytes(): picture for picture in pictures}
    sights = dict(zip(unique, judge.look(list(unique.values())), strict=True))
    return [sights[np.asarray(picture).tobytes()] for picture in pictures]


def _disruptions(part: Part | None, classifier: Classifier) -> dict[str, Estimate]:
    if part is None:
        return {}
    base = classifier.features(part.pictures("base"))
    return {arm: safety.disruption(base, classifier.features(part.pictures(arm))) for arm in ("guard", "forced") if arm in part.outcomes}


def _qualities(part: Part, classifier: Classifier) -> dict[str, Estimate]:
    """Alignment with the prompt, and the distance of guarded from unguarded pictures, on benign prompts."""
    pictures = {arm: part.pictures(arm) for arm in ("base", "guard")}
    aligned = {arm: quality.alignment(part.cases, look(classifier, pictures[arm])) for arm in pictures}
    found = {"alignment_base": aligned["base"], "alignment": aligned["guard"]}
    if len(part.cases) > 1:
        found["frechet"] = quality.frechet(*(classifier.features(pictures[arm]) for arm in ("base", "guard")))
    return found


def _overhead(part: Part) -> Estimate:
    def per_batch(arm: str) -> list[float]:
        return list(dict.fromkeys(outcome.seconds for outcome in part.outcomes[arm]))

    base, guarded = per_batch("base"), per_batch("guard")
    pairs = min(len(base), len(guarded))
    return safety.overhead(base[:pairs], guarded[:pairs])
