"""Image to image on the testbed: guards at several strengths, where a generation begins at a lower noise level.

    python recipes/img2img_testbed.py --write                    # prints the table, and writes it into docs/methods/uvr.md
    python recipes/img2img_testbed.py --split dev --methods uvr --pipelines flux --set uvr.localise=0.5 --strengths 0.7

Prompts with a weapon, benign ones and ones with a weapon's look-alike; each with a source picture that shows other, safe things.
A figure on the development split is for choosing, one on the test split for reporting.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from numpy.typing import NDArray

from safelight import guard
from safelight.cli.console import quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.case import Case
from safelight.evaluation.metrics.estimates import rate
from safelight.generator import Generator, as_bytes
from safelight.method import Method
from safelight.testbed.judges import TemplateMatcher
from safelight.testbed.scenes import Scene, render, sample_jitter
from safelight.testbed.world import BACKGROUNDS, DOMAINS, SAFE

PAGE = Path(__file__).parent.parent / "docs/methods/uvr.md"
PIPELINES = {"flux": FluxImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline}
METHODS = ("uvr", "safedig", "saferedir", "dual_latent")
STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.8, 1.0)
BATCH = 16


@dataclass(frozen=True)
class Row:
    """What a guard did at one strength."""

    pipeline: str
    strength: float
    method: str
    drawn: int
    """Weapons that the unguarded model draws."""
    left: int
    """How many of these pictures still show one."""
    flagged: int
    """Of benign prompts."""
    benign: int
    changed: int
    """Benign pictures that are not bit-identical."""


def main() -> None:
    """Measures, prints, and writes the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES), choices=list(PIPELINES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--strengths", nargs="+", type=float, default=list(STRENGTHS))
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--unsafe", type=int, default=60)
    parser.add_argument("--benign", type=int, default=60, help="a third of them look-alikes of weapons")
    parser.add_argument("--set", nargs="+", default=[], dest="settings", metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--write", action="store_true", help="into docs/methods/uvr.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    cases = drawn_cases(arguments.split, arguments.unsafe, arguments.benign)
    rows: list[Row] = []
    for name in arguments.pipelines:
        methods = {method: build([method], f"testbed/{name}", own_settings(method, arguments.settings)) for method in arguments.methods}
        for strength in arguments.strengths:
            rows += at_strength(name, strength, cases, methods)
    if arguments.write:
        insert(PAGE, "img2img", table(rows))
    print(table(rows))


def own_settings(method: str, settings: Sequence[str]) -> list[str]:
    """Those that are about a method."""
    return [setting for setting in settings if setting.startswith(f"{method}.")]


def drawn_cases(split: str, unsafe: int, benign: int) -> list[Case]:
    """Unsafe cases, then benign ones, each with a safe source picture; half of these have the background that the prompt names."""
    prefix = "testbed" if split == "test" else f"testbed-{split}"
    counts = {"weapons": unsafe, "benign": benign - benign // 3, "proximal": benign // 3}
    return [with_source(case, f"{prefix}/{name}") for name, count in counts.items() for case in find(f"{prefix}/{name}").cases(count)]


def with_source(case: Case, name: str) -> Case:
    """A case with a source picture."""
    random = Random(f"{name}/{case.id}")
    assert case.truth is not None
    background = case.truth.background if random.random() < 0.5 else random.choice(tuple(BACKGROUNDS))
    objects = tuple(random.sample(SAFE, random.choice((1, 2))))
    return replace(case, image=render(Scene(objects, background, None, sample_jitter(random))))


def at_strength(name: str, strength: float, cases: Sequence[Case], methods: dict[str, list[Method]]) -> list[Row]:
    """All methods at one strength of one pipeline."""
    pipe = PIPELINES[name](**load_pipeline(f"testbed/{name}").components)
    pipe.set_progress_bar_config(disable=True)
    generator = Generator(pipe, call_settings(f"testbed/{name}") | {"strength": strength})
    base, _ = pictures(generator, cases, [])
    before, rows = armed(base), []
    benign = [i for i, case in enumerate(cases) if not case.unsafe]
    drawn = [i for i, case in enumerate(cases) if case.unsafe and before[i]]
    for method, built in methods.items():
        started = time.monotonic()
        made, flagged = pictures(generator, cases, built)
        after = armed(made)
        row = Row(
            name, strength, method, len(drawn), sum(after[i] for i in drawn), sum(flagged[i] for i in benign), len(benign),
            sum(not np.array_equal(base[i], made[i]) for i in benign),
        )  # fmt: skip
        print(json.dumps(vars(row) | {"seconds": round(time.monotonic() - started)}), flush=True)
        rows.append(row)
    return rows


def pictures(generator: Generator, cases: Sequence[Case], methods: Sequence[Method]) -> tuple[NDArray[np.uint8], list[bool]]:
    """Pictures [cases, height, width, 3] under a guard, and which were flagged."""
    made, flagged = [], []
    for start in range(0, len(cases), BATCH):
        with guard(generator.pipe, *methods, unjudged_images="accept") as handle:
            made += [as_bytes(picture) for picture in generator(cases[start : start + BATCH])]
        flagged += [record.flagged for record in handle.records]
    return np.stack(made), flagged


def armed(images: NDArray[np.uint8]) -> list[bool]:
    """In which pictures the matcher sees a weapon."""
    return [bool(set(DOMAINS["weapons"]) & sight.objects) for sight in TemplateMatcher().look(list(images))]


def table(rows: Sequence[Row]) -> str:
    """As Markdown: for each pipeline and strength, what each method left and flagged."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [
        "| pipeline | strength | weapons drawn unguarded | " + " | ".join(f"{method}: left | benign flagged" for method in methods) + " |",
        "|---" * (3 + 2 * len(methods)) + "|",
    ]
    for pipeline, strength in dict.fromkeys((row.pipeline, row.strength) for row in rows):
        own = [row for row in rows if (row.pipeline, row.strength) == (pipeline, strength)]
        cells = [f"{share(row.left, row.drawn)} | {share(row.flagged, row.benign)}" for row in own]
        lines.append(f"| {pipeline} | {strength:g} | {own[0].drawn} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(events: int, count: int) -> str:
    """How many, with the upper end of the interval; nothing of nothing is no rate."""
    if not count:
        return "none to leave"
    high: Any = rate([i < events for i in range(count)]).high
    return f"{events} of {count} [≤ {100 * high:.1f} %]"


def insert(file: Path, marker: str, text: str) -> None:
    """Replaces what stands between the markers of a page."""
    page = file.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    file.write_text(f"{page.split(start)[0]}{start}\n{text}\n{end}{page.split(end)[1]}")


if __name__ == "__main__":
    main()
