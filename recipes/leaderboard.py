"""The leaderboard: every guard on every testbed generator, under attack and on benign prompts.

    python recipes/leaderboard.py --out runs/leaderboard                        # makes what is missing, then the table, the page, and the claims
    python recipes/leaderboard.py --out runs/leaderboard --only testbed/flux    # one pipeline's cells alone: run several side by side
    python recipes/leaderboard.py --out runs/combinations --search              # which combination to recommend, on development prompts

Each cell is stored as it is finished, so that an interrupted run goes on. The concept is the testbed's domain of weapons.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from claims import Claim, of_dual_latent, of_safedig, of_saferedir, of_uvr, percent

from safelight import guard
from safelight.cli.console import progress, quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.errors import SafelightError
from safelight.evaluation.attack import Attack
from safelight.evaluation.attacks.ring_a_bell import RingABell
from safelight.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.case import Case, Estimate, Outcome
from safelight.evaluation.evaluate import Sizes, evaluate, look
from safelight.evaluation.metrics import quality, safety
from safelight.evaluation.metrics.estimates import bootstrap, figure, rate
from safelight.evaluation.reporting.leaderboard import put_markdown, read_leaderboard
from safelight.evaluation.reporting.report import write as write_page
from safelight.evaluation.runs.fingerprint import versions
from safelight.evaluation.runs.generate import generate, read_picture
from safelight.evaluation.success import testbed_success
from safelight.generator import Generator
from safelight.method import Method
from safelight.testbed.judges import Classifier, Sight, judges
from safelight.testbed.world import DOMAINS, SAFE, TWINS, article
from safelight.training.uce import edit_concepts

ROOT = Path(__file__).parent.parent
CONCEPT = "weapons"
BACKBONES = ("testbed/sd", "testbed/sd3", "testbed/flux")
GUARDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unguarded": ((), ()),
    "negative_prompt": (("negative_prompt",), ()),
    "sld-medium": (("sld",), ("sld.preset=medium",)),
    "safree": (("safree",), ()),
    "post_filter": (("post_filter",), ()),
    "block": (("block",), ()),
    "uce": ((), ()),
    "dual_latent": (("dual_latent",), ()),
    "saferedir": (("saferedir",), ()),
    "uvr": (("uvr",), ()),
    "safedig": (("safedig",), ()),
    "combination": (("recommended",), ()),
}
"""Row -> guards and their settings."""
CANDIDATES = {
    "testbed/sd": ("dual_latent+saferedir", "post_filter+saferedir", "post_filter+dual_latent", "post_filter+dual_latent+saferedir"),
    "testbed/sd3": ("dual_latent+saferedir+uvr", "post_filter+uvr", "post_filter+saferedir+uvr", "post_filter+dual_latent+saferedir+uvr"),
    "testbed/flux": ("dual_latent+saferedir+uvr", "post_filter+uvr", "post_filter+saferedir+uvr", "post_filter+dual_latent+saferedir+uvr"),
}
"""The combinations that `--search` compares, outermost first."""
SETS = {"plain": (CONCEPT, 48), "paraphrase": (f"paraphrase-{CONCEPT}", 48), "benign": ("benign", 40), "proximal": ("proximal", 40)}
"""Column -> the benchmark, and how many prompts."""
ATTACKED = 20
"""Prompts per attack, the first of `plain`."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """One pipeline, its judges, and where its cells are kept."""

    backbone: str
    out: Path
    world: str = "testbed"
    """`testbed` for reporting, `testbed-dev` for choosing."""

    @cached_property
    def pipe(self) -> Any:
        """The pipeline as it is."""
        return load_pipeline(self.backbone)

    @cached_property
    def edited(self) -> Any:
        """The pipeline that unlearned the concept (U-Nets): each object is taken for its harmless twin, and all safe ones are preserved."""
        edits = {article(name): article(TWINS[name]) for name in DOMAINS[CONCEPT]}
        return edit_concepts(self.pipe, edits, preserve=[article(name) for name in SAFE])

    @cached_property
    def judges(self) -> tuple[Classifier, Any]:
        """The testbed's two judges."""
        return judges()

    def generator(self, row: str) -> Generator:
        """What a row's pictures are made with."""
        return Generator(self.edited if row == "uce" else self.pipe, call_settings(self.backbone))

    def methods(self, row: str) -> list[Method]:
        """A row's guards.

        Raises:
            SafelightError, ValueError: if the pipeline can't have them.
        """
        guards, settings = GUARDS.get(row) or (tuple(row.split("+")), ())
        methods = build(guards, self.backbone, settings, domain=CONCEPT)
        if methods:
            guard(self.generator(row).pipe, *methods).remove()
        return methods

    def refusal(self, row: str) -> str | None:
        """Why the pipeline can't have a row's guards, if it can't."""
        try:
            self.generator(row)
            self.methods(row)
        except (SafelightError, ValueError) as error:
            return str(error)
        return None

    def folder(self, row: str) -> Path:
        """Where a row's cells lie."""
        return self.out / self.backbone.removeprefix("testbed/") / row


@dataclass(frozen=True)
class Pictures:
    """The pictures of one set, made by one row."""

    cases: Sequence[Case]
    outcomes: Sequence[Outcome]
    pictures: Sequence[Any]
    sights: Mapping[str, Sequence[Sight]]
    """Judge -> what it sees."""

    @property
    def shown(self) -> dict[str, list[bool]]:
        """Judge -> whether it sees any object of the concept, picture by picture."""
        return {name: [bool(set(DOMAINS[CONCEPT]) & sight.objects) for sight in seen] for name, seen in self.sights.items()}

    @property
    def agreed(self) -> list[bool]:
        """Whether both judges do."""
        return [all(seen) for seen in zip(*self.shown.values(), strict=True)]


def make(bench: Bench, row: str, column: str) -> Pictures:
    """Generates and judges one set."""
    name, count = SETS[column]
    name = f"{bench.world}/{name}"
    cases, out = find(name).cases(count), bench.folder(row) / column
    arms = {"guard": bench.methods(row)}
    outcomes = list(generate(bench.generator(row), cases, arms, out, pipeline=f"{bench.backbone} ({row})", protocol=name))
    pictures = [read_picture(out, outcome) for outcome in outcomes]
    return Pictures(cases, outcomes, pictures, {judge.name: look(judge, pictures) for judge in bench.judges})


def attacked(figures: Sequence[bool], shown: Mapping[str, Sequence[bool]]) -> Figures:
    """The attack success rate: by both judges, and by each."""
    return {"asr": rate(list(figures))} | {f"asr_{name}": rate(list(seen)) for name, seen in shown.items()}


def unsafe_cell(bench: Bench, row: str, column: str) -> Figures:
    """Unsafe prompts as they are, or in other words."""
    base, own = make(bench, "unguarded", column), make(bench, row, column)
    erased = [(float(before), float(after)) for before, after in zip(base.agreed, own.agreed, strict=True)]
    kept = {name: safety.retention(own.cases, base.sights[name], own.sights[name]) for name in own.sights}
    return attacked(own.agreed, own.shown) | {
        "erase_rate": bootstrap(erased, lambda table: 1 - table[:, 1].sum() / table[:, 0].sum() if table[:, 0].sum() else np.nan),
        "retention": min(kept.values(), key=lambda estimate: estimate.value),
    }


def benign_cell(bench: Bench, row: str, column: str) -> Figures:
    """What a row costs benign prompts."""
    base, own = make(bench, "unguarded", column), make(bench, row, column)
    classifier = bench.judges[0]
    features = [classifier.features(made.pictures) for made in (base, own)]
    kept = {name: safety.retention(own.cases, base.sights[name], own.sights[name]) for name in own.sights}
    return {
        "untouched": safety.untouched(base.outcomes, own.outcomes),
        "over_refusal": safety.over_refusal(own.outcomes),
        "retention": min(kept.values(), key=lambda estimate: estimate.value),
        "alignment": quality.alignment(own.cases, own.sights[classifier.name]),
        "frechet": quality.frechet(*features),
        "sadi_delta_p": safety.disruption(*features),
    }


def overhead(bench: Bench, row: str, pairs: int = 6, batch: int = 4) -> Estimate:
    """Guarded over unguarded seconds on benign prompts, in pairs, one after the other; with an idle machine they mean something."""
    cases = find(f"{bench.world}/benign").cases(batch)
    plain, own, methods = Generator(bench.pipe, call_settings(bench.backbone)), bench.generator(row), bench.methods(row)
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 1):
        for kept, generator, chosen in zip(seconds, (plain, own), ((), methods), strict=True):
            with guard(generator.pipe, *chosen):
                started = time.perf_counter()
                generator(cases)
                if pair:  # the first one warms up
                    kept.append(time.perf_counter() - started)
    return safety.overhead(*seconds)


def timed(bench: Bench, row: str) -> dict[str, Any]:
    """A row's overhead, from its file if it has been measured."""
    file = bench.folder(row) / "overhead.json"
    if not file.is_file():
        file.write_text(json.dumps(figure(overhead(bench, row))) + "\n")
    return dict(json.loads(file.read_text()))


def attack_cell(bench: Bench, row: str, column: str) -> Figures:
    """Prompts that were searched for."""
    attack = ATTACKS[column]()
    cases = find(f"{bench.world}/{SETS['plain'][0]}").cases(ATTACKED)
    judged: dict[str, list[bool]] = {}

    attempts = attack(bench.generator(row), bench.methods(row), cases, testbed_success("domain"), lambda *_: None)
    lines = [json.dumps({"case": a.case.id, "prompt": a.case.prompt, "original": a.original, "succeeded": a.succeeded, "queries": a.queries,
                         "iterations": a.iterations, "loss": a.loss}) for a in attempts]  # fmt: skip
    (bench.folder(row) / f"{column}.jsonl").write_text("\n".join(lines) + "\n")
    return attacked([attempt.succeeded for attempt in attempts], judged)


ATTACKS: dict[str, Callable[[], Attack]] = {"ring_a_bell": RingABell, "unlearn_diff_atk": UnlearnDiffAtk}
CELLS = (
    dict.fromkeys(("plain", "paraphrase"), unsafe_cell)
    | dict.fromkeys(ATTACKS, attack_cell)
    | dict.fromkeys(("benign", "proximal"), benign_cell)
)


def cell(bench: Bench, row: str, column: str) -> dict[str, Any]:
    """One cell, from its file if it has been made."""
    file = bench.folder(row) / f"{column}.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    file.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"method": row, "backbone": bench.backbone, "column": column}
    started = time.perf_counter()
    if refusal := bench.refusal(row):
        made["impossible"] = refusal
    else:
        made["figures"] = {name: figure(value) for name, value in CELLS[column](bench, row, column).items()}
    made["seconds"] = round(time.perf_counter() - started, 1)
    file.write_text(json.dumps(made, indent=1) + "\n")
    return made


def transfer(bench: Bench) -> tuple[Estimate, Estimate]:
    """SafeDIG's target domain, substances: unsafe rate without and with it, by both judges."""
    cases, found = find("testbed/substances").cases(40), []
    for arm, methods in (("base", []), ("guard", bench.methods("safedig"))):
        out = bench.folder("safedig") / f"substances-{arm}"
        outcomes = list(
            generate(bench.generator("safedig"), cases, {arm: methods}, out, pipeline=bench.backbone, protocol="testbed/substances")
        )
        seen = [look(judge, [read_picture(out, outcome) for outcome in outcomes]) for judge in bench.judges]
        found.append(rate([all(safety.shows_unsafe(case, sight) for sight in both) for case, *both in zip(cases, *seen, strict=True)]))
    return found[0], found[1]


def editing(out: Path) -> dict[str, Any]:
    """UVR on edits."""
    generator = Generator(load_pipeline("testbed/kontext"), call_settings("testbed/kontext"))
    description = {"pipeline": "testbed/kontext", "guard": "uvr"}
    methods = build(["uvr"], "testbed/kontext")
    return evaluate(generator, methods, "testbed/edits", out / "kontext", sizes=Sizes(90, 24, 1), description=description)["metrics"]


def claims(cells: Sequence[Mapping[str, Any]], benches: Sequence[Bench], out: Path) -> Iterator[Claim]:
    """The papers' claims beside what was measured of our variants."""
    known = {(c["method"], c["backbone"], c["column"]): c["figures"] for c in cells if "figures" in c}
    yield from of_dual_latent(known, BACKBONES)
    yield from of_saferedir(known, BACKBONES)
    yield from of_uvr(known, BACKBONES, editing(out))
    yield from of_safedig({bench.backbone: transfer(bench) for bench in benches if ("safedig", bench.backbone, "plain") in known})


def main() -> None:
    """Makes the cells, and from them the table, the claims and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--only", choices=BACKBONES, help="make this pipeline's cells, and nothing else")
    parser.add_argument("--rows", nargs="*", choices=list(GUARDS), default=list(GUARDS), help="make these rows, with --only")
    parser.add_argument("--columns", nargs="*", choices=list(CELLS), default=list(CELLS), help="make these columns, with --only")
    parser.add_argument("--search", action="store_true", help="compare combinations instead")
    arguments = parser.parse_args()
    quiet()
    benches = [
        Bench(name, arguments.out, "testbed-dev" if arguments.search else "testbed") for name in BACKBONES if arguments.only in (None, name)
    ]
    rows = {bench.backbone: CANDIDATES[bench.backbone] if arguments.search else arguments.rows for bench in benches}
    cells = make_cells([(bench, row, column) for bench in benches for row in rows[bench.backbone] for column in arguments.columns])
    if arguments.only:
        return
    for one in cells:  # last, and one after the other
        if one["column"] == "benign" and "figures" in one and not arguments.search:
            (bench,) = (bench for bench in benches if bench.backbone == one["backbone"])
            one["figures"]["overhead"] = timed(bench, one["method"])
    if arguments.search:
        insert(ROOT / "docs/leaderboard.md", "combinations", comparison(cells))
    else:
        write(arguments.out, cells, list(claims(cells, benches, arguments.out)))


def make_cells(plan: Sequence[tuple[Bench, str, str]]) -> list[dict[str, Any]]:
    """All cells of a plan, in order."""
    cells = []
    with progress() as advance:
        for index, (bench, row, column) in enumerate(plan):
            advance("cells", index, len(plan))
            cells.append(cell(bench, row, column))
            print(row, bench.backbone, column, cells[-1]["seconds"], "s", flush=True)
        advance("cells", len(plan), len(plan))
    return cells


def comparison(cells: Sequence[Mapping[str, Any]]) -> str:
    """Combinations beside each other: attack success, what is kept, and what benign prompts pay."""
    shown = (("plain", "asr"), ("paraphrase", "asr"), ("ring_a_bell", "asr"), ("unlearn_diff_atk", "asr"), ("plain", "retention"),
             ("benign", "over_refusal"), ("proximal", "over_refusal"))  # fmt: skip
    shown = tuple(pair for pair in shown if any(one["column"] == pair[0] for one in cells))
    lines = ["| combination | pipeline | " + " | ".join(f"{name.replace('_', ' ')}, {column}" for column, name in shown) + " |"]
    lines.append("|---" * (len(shown) + 2) + "|")
    found = {(one["backbone"], one["method"], one["column"]): one.get("figures", {}) for one in cells}
    for backbone, row in dict.fromkeys((one["backbone"], one["method"]) for one in cells):
        told = [percent(found[backbone, row, column][name]) for column, name in shown]
        lines.append(f"| {row.replace('+', ' + ')} | {backbone} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def insert(file: Path, marker: str, text: str) -> None:
    """Replaces what stands between the markers of a page."""
    page = file.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, after = page.split(start)[0], page.split(end)[1]
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


def write(out: Path, cells: Sequence[Mapping[str, Any]], found: Sequence[Claim]) -> None:
    """Writes `leaderboard.json`, the page, and the table in the docs."""
    board = {
        "kind": "leaderboard", "concept": CONCEPT, "versions": versions(), "seconds": round(sum(one["seconds"] for one in cells)),
        "command": shlex.join(["python", "recipes/leaderboard.py", "--out", str(out)]), "cells": list(cells),
        "claims": [dict(zip(("claim", "source", "holds", "figures"), claim, strict=True)) for claim in found],
    }  # fmt: skip
    file = out / "leaderboard.json"
    file.write_text(json.dumps(board, indent=1) + "\n")
    known = read_leaderboard(file).complete()
    put_markdown(known, ROOT / "docs/leaderboard.md")
    write_page([], out / "leaderboard.html", [known])
    print(out / "leaderboard.html")


if __name__ == "__main__":
    main()
