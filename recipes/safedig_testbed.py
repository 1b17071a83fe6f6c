"""SafeDIG on the testbed: weapons as the known risk, substances as the new one, on both diffusion transformers.

    python recipes/safedig_testbed.py --out runs            # trains, evaluates, and writes the tables into docs/methods/safedig.md

Everything is resumed from the folder. `--only` makes some of the parts: transfer, ablation, positions, cost; `--pipelines` some of the models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uvr_testbed import cell, insert

from safelight import save
from safelight.backbone import Backbone
from safelight.cli.console import progress, quiet
from safelight.compose import call_settings, load_pipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.evaluate import Sizes, evaluate, look
from safelight.evaluation.metrics.safety import retention, unsafe_rate
from safelight.evaluation.runs.generate import generate, read_picture
from safelight.generator import Generator
from safelight.method import Method
from safelight.methods.safedig import SafeDIG
from safelight.testbed.judges import judges
from safelight.training.domains import Domains, from_testbed
from safelight.training.safedig import Made, assemble, calibrate, candidates, gather, make, testbed_config, train_sae

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/methods/safedig.md"
SOURCE, TARGET = "weapons", "substances"
PIPELINES = ("flux", "sd3")
STRENGTHS = {"flux": {"beta": 0.2, "gamma": 0.2}, "sd3": {"beta": 1.5, "gamma": 0.2}}
"""The published strengths; all else of the rows "near-published" is as `SafeDIG.near_published` says."""
SHOWN = (
    "unsafe_rate_base", "unsafe_rate", "erase_rate", "retention", "untouched", "over_refusal", "overhead_benign", "overhead_unsafe",
)  # fmt: skip
Advance = Callable[[str, int, int], None]


@dataclass
class Bench:
    """One pipeline, and what was made for it."""

    name: str
    out: Path
    advance: Advance
    generator: Generator
    domains: Domains
    made: Made

    @property
    def guard(self) -> SafeDIG:
        """The full method."""
        return SafeDIG(dictionaries=self.made.dictionaries)


def main() -> None:
    """Trains, evaluates, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    quiet()
    with progress() as advance:
        benches = [bench(name, arguments.out, advance) for name in arguments.pipelines]
        for part in arguments.only:
            lines = [line for number, one in enumerate(benches) for line in PARTS[part](one)[0 if number == 0 else 2 :]]
            print("\n".join(lines), flush=True)
            if len(benches) == len(PIPELINES):
                insert(PAGE, part, "\n".join(lines))


def bench(name: str, out: Path, advance: Advance) -> Bench:
    """Trains dictionaries, as `safelight train safedig weapons substances` does."""
    generator = Generator(load_pipeline(f"testbed/{name}"), call_settings(f"testbed/{name}"))
    domains, folder = from_testbed(SOURCE, TARGET), out / f"safedig-{name}"
    made = make(generator, domains, testbed_config(), folder, advance)
    save(folder, SafeDIG(dictionaries=made.dictionaries), made_for=f"testbed/{name}")
    print(json.dumps(dict(made.report)), flush=True)
    return Bench(name, folder, advance, generator, domains, made)


# The parts: each returns the lines of a table, of which the first two are its head


def transfer(one: Bench) -> list[str]:
    """Both domains, with benign and proximal prompts."""
    lines = ["| pipeline | prompts | n | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |", "|---" * (len(SHOWN) + 3) + "|"]
    for domain in (SOURCE, TARGET):
        result = evaluate(
            one.generator, [one.guard], f"testbed/{domain}", one.out / f"full-{domain}", sizes=Sizes(150, 100, 100),
            description={"pipeline": one.name, "made": dict(one.made.report["positions"])}, progress=one.advance,
        )  # fmt: skip
        cells = [cell(result["metrics"].get(name), name) for name in SHOWN]
        lines.append("| " + " | ".join([one.name, domain, str(result["n"]), *cells]) + " |")
    return lines


def cost(one: Bench) -> list[str]:
    """What benign pictures lose, and what dictionaries weigh."""
    lines = [
        "| pipeline | alignment, unguarded | guarded | Fréchet distance | size of the dictionaries | training |",
        "|---|---|---|---|---|---|",
    ]
    found = json.loads((one.out / f"full-{SOURCE}" / "results.json").read_text())["metrics"]
    size = sum(file.stat().st_size for file in one.out.glob("dictionary-*.safetensors")) / 1e6
    seconds = json.loads((one.out / "report.json").read_text())["seconds"]
    values = [found["alignment_base"]["value"], found["alignment"]["value"], found["frechet"]["value"]]
    lines.append(f"| {one.name} | {values[0]:.3f} | {values[1]:.3f} | {values[2]:.3f} | {size:.1f} MB | {seconds / 60:.1f} min |")
    return lines


def ablation(one: Bench) -> list[str]:
    """What is lost without a part of it."""
    near = SafeDIG.near_published(one.made.dictionaries, **STRENGTHS[one.name])
    arms = {
        "full": one.guard,
        "without transfer (source only)": SafeDIG(dictionaries=source_only(one)),
        "without gate": replace(one.guard, gated=False),
        "one position only": SafeDIG(dictionaries=tuple(part for part in one.made.dictionaries if part.threshold is not None)),
        "Repel instead of Blend": replace(one.guard, operator="repel"),
        "near-published Blend": replace(near, operator="blend"),
        "near-published Repel": replace(near, operator="repel"),
    }
    return table(one, {name: [method] for name, method in arms.items()}, 100, "ablation")


def source_only(one: Bench) -> tuple[Any, ...]:
    """Dictionaries that have not seen the target: decoder, harmful features and gate are the source's."""
    config, backbone = testbed_config(), Backbone.of(one.generator.pipe)
    recorded = gather(one.generator, one.domains, config, one.out, one.advance)
    total = int(one.generator.settings["num_inference_steps"])
    parts = [
        assemble(recorded, part.site, part.operator, part.sae, backbone, config, total, transfer=False) for part in one.made.dictionaries
    ]  # fmt: skip
    return calibrate(one.generator, parts, recorded, config, one.advance)[0]


def positions(one: Bench) -> list[str]:
    """Every candidate on its own, without a gate, beside what routing chose."""
    config, backbone = testbed_config(), Backbone.of(one.generator.pipe)
    recorded = gather(one.generator, one.domains, config, one.out, one.advance)
    total = int(one.generator.settings["num_inference_steps"])
    arms: dict[str, Sequence[Method]] = {"routed": [replace(one.guard, gated=False)]}
    for site in candidates(backbone):
        sae, _ = train_sae(recorded, site, config, one.out, one.advance)
        made = assemble(recorded, site, "blend", sae, backbone, config, total)
        arms[f"{site} alone"] = [SafeDIG(dictionaries=(made,), gated=False)]
    return table(one, arms, 60, "positions")


PARTS: Mapping[str, Callable[[Bench], list[str]]] = {
    "transfer": transfer, "cost": cost, "ablation": ablation, "positions": positions,
}  # fmt: skip


def table(one: Bench, arms: Mapping[str, Sequence[Method]], count: int, folder: str) -> list[str]:
    """Unsafe rates by each judge and retention by the stricter one, for each arm and domain; the unguarded model's once."""
    lines = [
        "| pipeline | arm | weapons, classifier | matcher | retention | substances, classifier | matcher | retention |", "|---" * 8 + "|",
    ]  # fmt: skip
    cells: dict[str, list[str]] = {name: [] for name in ("unguarded", *arms)}
    for domain in (SOURCE, TARGET):
        cases, out = find(f"testbed/{domain}").cases(count), one.out / f"{folder}-{domain}"
        out.mkdir(parents=True, exist_ok=True)
        slugs = {name: f"arm{number}" for number, name in enumerate(cells)}
        methods: dict[str, Sequence[Method]] = {slugs[name]: arms.get(name, ()) for name in cells}
        pictures: dict[str, list[Any]] = {slug: [] for slug in methods}
        for outcome in generate(one.generator, cases, methods, out, 8, lambda images: None):
            pictures[outcome.arm].append(read_picture(out, outcome))
        for name, slug in slugs.items():
            seen = [(look(judge, pictures[slugs["unguarded"]]), look(judge, pictures[slug])) for judge in judges()]
            cells[name] += [cell(unsafe_rate(cases, after)._asdict(), name) for _, after in seen]
            kept = min((retention(cases, before, after) for before, after in seen), key=lambda found: found.value)
            cells[name].append(cell(kept._asdict(), name))
    return lines + [f"| {one.name} | {name} | " + " | ".join(row) + " |" for name, row in cells.items()]


if __name__ == "__main__":
    main()
