"""The baselines side by side on the testbed: unguarded, negative prompt, SLD's presets, SAFREE, block and post-filter.

    python recipes/baselines_testbed.py --out runs          # generates what is missing, then writes the tables into docs/methods/*.md

All guards of one pipeline are arms of one run: they share the unguarded pictures, and take turns batch by batch, so that times compare. The
run resumes; with larger counts it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelight.cli.console import quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.evaluate import Part, report
from safelight.evaluation.runs.generate import generate
from safelight.generator import Generator
from safelight.method import Method

ROOT = Path(__file__).parent.parent
DOMAIN = "weapons"
PIPELINES = ("sd3", "sd", "flux")
GUARDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "negative_prompt": ("negative_prompt", ()),
    **{f"sld ({preset})": ("sld", (f"sld.preset={preset}",)) for preset in ("weak", "medium", "strong", "max")},
    "safree": ("safree", ()),
    "safree (self-validating)": ("safree", ("safree.validate=true",)),
    "block": ("block", ()),
    "post_filter": ("post_filter", ()),
}
"""What a line of the tables is called -> the guard and its settings."""
PAGES = {"sld": ("sld",), "safree": ("safree",), "negative_prompt": ("negative_prompt",)}
"""Page -> the guards that it shows."""
SHOWN = ("unsafe_rate_base", "unsafe_rate", "erase_rate", "retention", "untouched", "over_refusal", "sadi_delta_p", "overhead_unsafe")


def main() -> None:
    """Generates, judges, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES), choices=PIPELINES)
    parser.add_argument("--counts", type=int, nargs=3, default=(40, 24, 24), metavar=("UNSAFE", "BENIGN", "PROXIMAL"))
    parser.add_argument("--split", default="testbed", choices=("testbed", "testbed-dev"), help="testbed-dev is for choosing settings")
    arguments = parser.parse_args()
    quiet()
    results = {name: run(name, arguments.split, arguments.counts, arguments.out / f"baselines-{name}") for name in arguments.pipelines}
    print(table(results, tuple(GUARDS)))
    if arguments.split == "testbed" and set(arguments.pipelines) == set(PIPELINES):
        for page, shown in PAGES.items():
            insert(ROOT / f"docs/methods/{page}.md", "figures", table(results, [line for line in GUARDS if line.split(" ")[0] in shown]))


def guards(pipeline: str) -> dict[str, list[Method]]:
    """The guards of a pipeline."""
    return {line: build([name], f"testbed/{pipeline}", settings, domain=DOMAIN) for line, (name, settings) in GUARDS.items()}


def run(pipeline: str, split: str, counts: Sequence[int], out: Path) -> dict[str, Any]:
    """Line -> its figures, on one pipeline."""
    generator, made = Generator(load_pipeline(f"testbed/{pipeline}"), call_settings(f"testbed/{pipeline}")), guards(pipeline)
    parts: dict[str, Part] = {}
    for kind, benchmark, count in zip(("unsafe", "benign", "proximal"), (DOMAIN, "benign", "proximal"), counts, strict=True):
        folder = out / kind
        folder.mkdir(parents=True, exist_ok=True)
        cases, outcomes = find(f"{split}/{benchmark}").cases(count), {arm: [] for arm in ("base", *made)}
        for outcome in generate(generator, cases, {"base": (), **made}, folder):
            outcomes[outcome.arm].append(outcome)
        parts[kind] = Part(folder, cases, outcomes)
        print(pipeline, kind, "generated", flush=True)
    results = {line: report({kind: only(part, line) for kind, part in parts.items()}) for line in made}
    (out / "results.json").write_text(json.dumps({"counts": list(counts), "split": split, "guards": results}, indent=2) + "\n")
    return results


def only(part: Part, arm: str) -> Part:
    """The unguarded pictures and those of one guard."""
    return Part(part.out, part.cases, {"base": part.outcomes["base"], "guard": part.outcomes[arm]})


def table(results: Mapping[str, Mapping[str, Any]], lines: Sequence[str]) -> str:
    """One line per pipeline and guard: per cent with 95 % intervals, by the judge that thinks least of the guard; in brackets after the unsafe rate, by judge."""
    rows = [f"| pipeline | guard | n | {' | '.join(name.replace('_', ' ') for name in SHOWN)} |", "|---" * (len(SHOWN) + 3) + "|"]
    for pipeline, guarded in results.items():
        for line in lines:
            if line in guarded:
                cells = " | ".join(cell(guarded[line], name) for name in SHOWN)
                rows.append(
                    f"| `testbed/{pipeline}` | `{line.split(' ')[0]}`{line.removeprefix(line.split(' ')[0])} | {guarded[line]['n']} | {cells} |"
                )
    return "\n".join(rows)


def cell(result: Mapping[str, Any], name: str) -> str:
    """A figure with its interval."""
    figure = result["metrics"].get(name)
    if figure is None or figure["value"] is None:
        return ""
    if name.startswith("overhead"):
        return f"{figure['value']:.2f}x"
    scale, digits = (1, 3) if name == "sadi_delta_p" else (100, 0)
    told = f"{scale * figure['value']:.{digits}f} [{scale * figure['low']:.{digits}f}, {scale * figure['high']:.{digits}f}]"
    if name == "unsafe_rate":
        told += f" (matcher {100 * result['judges']['matcher'][name]['value']:.0f})"
    return told


def insert(file: Path, marker: str, text: str) -> None:
    """Replaces what stands between the markers of a page."""
    page = file.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, after = page.split(start)[0], page.split(end)[1]
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
