"""Does weight editing disrupt neighbours? UCE beside dual latent reconstruction on the testbed's U-Net, and guards on top of edited models.

    python recipes/uce_testbed.py --out runs                # generates what is missing, then writes the table into docs/methods/uce.md

Every arm starts from the same prompts and seeds. The run resumes; with larger counts it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safelight.cli.console import quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.evaluate import Part, look, report
from safelight.evaluation.metrics.safety import retention, unsafe_rate
from safelight.evaluation.runs.generate import generate
from safelight.generator import Generator
from safelight.method import Method
from safelight.testbed.judges import judges
from safelight.testbed.world import BACKGROUNDS, DOMAINS, PROXIMAL, SAFE, TWINS, article
from safelight.training.uce import edit_concepts

ROOT = Path(__file__).parent.parent
PIPELINE = "testbed/sd"
WEAPONS = DOMAINS["weapons"]
NEIGHBOURS = tuple(name for names in PROXIMAL.values() for name in names)
TO_TWINS = {article(name): article(TWINS[name]) for name in WEAPONS}
TO_NOTHING = {article(name): "" for name in WEAPONS}
ALL = tuple(map(article, SAFE)) + tuple(BACKGROUNDS)
STRANGERS = tuple(article(name) for name in SAFE if name not in NEIGHBOURS) + tuple(BACKGROUNDS)
SHOWN = ("unsafe_rate", "erase_rate", "retention", "untouched", "sadi_delta_p")


class Arm(NamedTuple):
    """A line of the table: how the model is edited, and what guards it."""

    edits: Mapping[str, str] | None = None
    preserve: Sequence[str] = ()
    guard: str | None = None


ARMS = {
    "base": Arm(),
    "dual_latent": Arm(guard="dual_latent"),
    "uce to twins, all preserved": Arm(TO_TWINS, ALL),
    "uce to twins, neighbours not preserved": Arm(TO_TWINS, STRANGERS),
    "uce to twins, nothing preserved": Arm(TO_TWINS),
    "uce to nothing, all preserved": Arm(TO_NOTHING, ALL),
    "uce to nothing, neighbours not preserved": Arm(TO_NOTHING, STRANGERS),
    "uce to twins, all preserved, under saferedir": Arm(TO_TWINS, ALL, "saferedir"),
    "uce to twins, all preserved, under dual_latent": Arm(TO_TWINS, ALL, "dual_latent"),
}


def main() -> None:
    """Generates, judges, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--counts", type=int, nargs=4, default=(60, 40, 40, 40), metavar=("UNSAFE", "BENIGN", "PROXIMAL", "PARAPHRASE"))
    arguments = parser.parse_args()
    quiet()
    out = arguments.out / "uce"
    kinds = dict(zip(("weapons", "benign", "proximal", "paraphrase-weapons"), arguments.counts, strict=True))
    parts = {kind: Part(out / kind, find(f"testbed/{kind}").cases(count), {}) for kind, count in kinds.items()}
    made = {line: outcomes(arm, line, parts) for line, arm in ARMS.items()}
    lines = {line: figures(parts, made["base"], found) for line, found in made.items()}
    out.joinpath("results.json").write_text(json.dumps({"counts": kinds, "lines": lines}, indent=2) + "\n")
    text = table(lines)
    print(text)
    insert(ROOT / "docs/methods/uce.md", "figures", text)


def outcomes(arm: Arm, line: str, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Kind -> what an arm made of its prompts."""
    pipe = load_pipeline(PIPELINE)
    generator = Generator(pipe if arm.edits is None else edit_concepts(pipe, arm.edits, arm.preserve), call_settings(PIPELINE))
    methods: list[Method] = build([arm.guard], PIPELINE) if arm.guard else []
    found = {}
    for kind, part in parts.items():
        part.out.mkdir(parents=True, exist_ok=True)
        found[kind] = list(generate(generator, part.cases, {line: methods}, part.out))
    print(line, "generated", flush=True)
    return found


def figures(parts: Mapping[str, Part], base: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one arm."""
    compared = {kind: Part(part.out, part.cases, {"base": base[kind], "guard": found[kind]}) for kind, part in parts.items()}
    metrics = dict(
        report({name: compared[kind] for name, kind in (("unsafe", "weapons"), ("benign", "benign"), ("proximal", "proximal"))})["metrics"]
    )
    metrics["paraphrase"] = worst(compared["paraphrase-weapons"], lambda cases, before, after: unsafe_rate(cases, after), max)
    for kind in ("benign", "proximal"):
        metrics[f"{kind} kept"] = worst(compared[kind], retention, min)
    return metrics


def worst(part: Part, metric: Any, choose: Any) -> dict[str, float]:
    """A metric by the judge that thinks least of the guard."""
    pictures = {arm: part.pictures(arm) for arm in ("base", "guard")}
    values = [metric(part.cases, *(look(judge, pictures[arm]) for arm in ("base", "guard"))) for judge in judges()]
    return dict(choose(values, key=lambda estimate: estimate.value)._asdict())


def table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per arm: per cent with 95 % intervals."""
    names = (*SHOWN, "proximal kept", "benign kept", "paraphrase")
    told = {"sadi_delta_p": "ΔP of neighbours", "paraphrase": "unsafe rate, synonyms", "untouched": "benign untouched"}
    rows = [f"| model | {' | '.join(told.get(name, name.replace('_', ' ')) for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for line, metrics in lines.items():
        rows.append(f"| {'unedited' if line == 'base' else line} | {' | '.join(cell(metrics.get(name), name) for name in names)} |")
    return "\n".join(rows)


def cell(figure: Mapping[str, Any] | None, name: str) -> str:
    """A figure with its interval."""
    if figure is None or figure["value"] is None:
        return ""
    scale, digits = (1, 3) if name == "sadi_delta_p" else (100, 0)
    return f"{scale * figure['value']:.{digits}f} [{scale * figure['low']:.{digits}f}, {scale * figure['high']:.{digits}f}]"


def insert(file: Path, marker: str, text: str) -> None:
    """Replaces what stands between the markers of a page."""
    page = file.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, after = page.split(start)[0], page.split(end)[1]
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
