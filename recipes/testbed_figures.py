"""All of README's figures: checks of the bundled models, and every guard on the testbed's benchmarks.

    python recipes/testbed_figures.py --out runs            # generates what is missing, then writes the table into README.md

Each line of `PLAN` is a `safelight` command whose folder resumes, so this can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CHECKS = ("judges", "testbed/sd", "testbed/flux", "testbed/kontext")
BASELINE = (48, 24, 40)
"""How many unsafe, benign and proximal prompts a baseline gets."""
PLAN = (
    ("testbed/sd", "dual_latent", "testbed/weapons", (80, 40, 40)),
    ("testbed/flux", "dual_latent", "testbed/weapons", (80, 40, 40)),
    ("testbed/kontext", "dual_latent", "testbed/edits-unsafe", (40, 20, 1)),
    ("testbed/sd", "negative_prompt", "testbed/weapons", BASELINE),
    ("testbed/sd", "block", "testbed/weapons", BASELINE),
    ("testbed/flux", "negative_prompt", "testbed/weapons", BASELINE),
    ("testbed/flux", "block", "testbed/weapons", BASELINE),
)
SHOWN = ("unsafe_rate_base", "unsafe_rate", "erase_rate", "retention", "untouched", "over_refusal", "sadi", "sadi_delta_p_forced")


def main() -> None:
    """Runs the plan and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    checks = {what: check(what, out) for what in CHECKS}
    results = [evaluation(*row, out) for row in PLAN]
    insert(ROOT / "README.md", "figures", checks_table(checks) + "\n\n" + guards_table(results))
    insert(ROOT / "docs/methods/dual_latent.md", "figures", guards_table([row for row in results if row["guard"] == "dual_latent"]))


def check(what: str, out: Path) -> dict[str, Any]:
    """The figures of `safelight testbed check`, kept in a file."""
    file = out / f"check-{what.split('/')[-1]}.json"
    if not file.is_file():
        file.write_text(safelight("testbed", "check", what))
    return dict(json.loads(file.read_text())["judges"])


def evaluation(pipeline: str, guard: str, benchmark: str, sizes: tuple[int, int, int], out: Path) -> dict[str, Any]:
    """The results of `safelight evaluate`."""
    folder = out / f"{pipeline.split('/')[-1]}-{benchmark.split('/')[-1]}-{guard}"
    words = ("--pipeline", pipeline, "--guard", guard, "--benchmark", benchmark, "--out", str(folder))
    counts = zip(("--unsafe", "--benign", "--proximal"), map(str, sizes), strict=True)
    return dict(json.loads(safelight("evaluate", *words, *(word for pair in counts for word in pair))))


def safelight(*words: str) -> str:
    """A command's JSON."""
    command = [sys.executable, "-c", "from safelight.cli import main; main()", *words, "--json"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def checks_table(checks: dict[str, Any]) -> str:
    """What the bundled models can do."""
    lines = ["| bundled model | figure | classifier | template matcher |", "|---|---|---|---|"]
    for what, judges in checks.items():
        for name in judges["classifier"]:
            cells = " | ".join(percent(judges[judge][name]) for judge in ("classifier", "matcher"))
            lines.append(f"| `{what}` | {name.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def guards_table(results: list[dict[str, Any]]) -> str:
    """What guards do, by the judge that thinks least of each."""
    lines = [
        f"| pipeline, benchmark | guard | {' | '.join(name.replace('_', ' ') for name in SHOWN)} |",
        f"|---|---|{'---|' * len(SHOWN)}",
    ]
    for row in results:
        cells = " | ".join(percent(row["metrics"][name]) if name in row["metrics"] else "" for name in SHOWN)
        lines.append(f"| `{row['pipeline']}`, `{row['protocol']}` | `{row['guard']}` | {cells} |")
    return "\n".join(lines)


def percent(figure: dict[str, Any]) -> str:
    """A figure with its interval."""
    if figure["value"] is None:
        return "undefined"
    value, low, high = (100 * figure[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def insert(file: Path, name: str, text: str) -> None:
    """Puts text between a file's markers `<!-- name -->` and `<!-- /name -->`."""
    before, _, rest = file.read_text().partition(f"<!-- {name} -->")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    file.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


if __name__ == "__main__":
    main()
