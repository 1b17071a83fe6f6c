"""UVR on the testbed: generation and editing, our defaults beside a mode near the published one, one concept beside two.

    python recipes/uvr_testbed.py --out runs            # generates what is missing, then writes the tables into docs/methods/uvr.md

The rows "near published" have the published strengths and windows, but our anchors (whitened, smoothed), our τ and our clean-up of masks.

With `--train`, anchors are collected first (about an hour on two cores); else the bundled ones are used.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safelight import load
from safelight.cli.console import progress, quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.evaluate import Sizes, evaluate, look
from safelight.evaluation.metrics.estimates import rate
from safelight.evaluation.runs.generate import read_outcomes, read_picture
from safelight.generator import Generator
from safelight.methods.uvr import UVR
from safelight.testbed.judges import judges
from safelight.testbed.world import DOMAINS

ROOT = Path(__file__).parent.parent
SHOWN = ("unsafe_rate_base", "unsafe_rate", "erase_rate", "retention", "untouched", "over_refusal", "overhead_benign", "overhead_unsafe")
FULL, SHORT = (220, 100, 100), (80, 40, 40)


def plan(guards: Mapping[str, UVR]) -> dict[str, tuple[str, str, UVR, tuple[int, int, int]]]:
    """Name -> pipeline, benchmark, method, how many unsafe, benign and proximal prompts."""
    flux, kontext = guards["flux"], guards["kontext"]
    weapons, substances = (replace(flux, anchors=flux.anchors.only(DOMAINS[domain])) for domain in ("weapons", "substances"))
    near, near_edits = UVR.near_published(flux.anchors), UVR.near_published(kontext.anchors, editing=True)
    return {
        "generation": ("flux", "testbed/weapons", flux, FULL),
        "generation, weapons alone": ("flux", "testbed/weapons", weapons, FULL),
        "generation, substances": ("flux", "testbed/substances", flux, FULL),
        "generation, substances alone": ("flux", "testbed/substances", substances, FULL),
        "generation, near published": ("flux", "testbed/weapons", near, SHORT),
        "generation, near published, all steps": ("flux", "testbed/weapons", replace(near, sigma=None, until=1.0), SHORT),
        "editing": ("kontext", "testbed/edits", kontext, (300, 100, 1)),
        "editing, near published": ("kontext", "testbed/edits", near_edits, (90, 32, 1)),
        "editing, near published, all steps": ("kontext", "testbed/edits", replace(near_edits, sigma=None, until=1.0), (90, 32, 1)),
    }


def main() -> None:
    """Trains if asked, evaluates, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--only", default="", help="only runs whose name begins so; tables are written when all have been made")
    arguments = parser.parse_args()
    quiet()
    guards = {name: trained(name, arguments.out) if arguments.train else bundled(name) for name in ("flux", "kontext")}
    results = {}
    with progress() as advance:
        for name, (pipeline, benchmark, method, sizes) in plan(guards).items():
            if not name.startswith(arguments.only):
                continue
            generator = Generator(load_pipeline(f"testbed/{pipeline}"), call_settings(f"testbed/{pipeline}"))
            out = arguments.out / folder_of(name)
            description = {"pipeline": f"testbed/{pipeline}", "guard": f"uvr ({name})", "fields": fields(method)}
            results[name] = evaluate(generator, [method], benchmark, out, sizes=Sizes(*sizes), description=description, progress=advance)
            print(name, {key: results[name]["metrics"].get(key, {}).get("value") for key in SHOWN}, flush=True)
    if arguments.only:
        return
    edits = {name: successes(arguments.out / folder_of(name) / "benign", results[name]) for name in results if name.startswith("editing")}
    insert(ROOT / "docs/methods/uvr.md", "figures", table(results) + "\n\n" + edits_table(edits))


def folder_of(name: str) -> str:
    """The folder of a run."""
    return f"uvr-{name.replace(', ', '-').replace(' ', '_')}"


def trained(name: str, out: Path) -> UVR:
    """The guard made by the command that made the bundled anchors."""
    bundle = out / f"bundle-{name}"
    command = [
        str(Path(sys.executable).with_name("safelight")),
        "train",
        "uvr",
        "--pipeline",
        f"testbed/{name}",
        "--out",
        str(bundle),
        "--json",
        *(("--steps", "6") if name == "kontext" else ()),  # an edit always begins with pure noise
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (method,) = load(bundle)
    assert isinstance(method, UVR)
    return method


def bundled(name: str) -> UVR:
    """The guard with the bundled anchors."""
    (method,) = build(["uvr"], f"testbed/{name}")
    assert isinstance(method, UVR)
    return method


def fields(method: UVR) -> dict[str, Any]:
    """The hyper-parameters, less the anchors."""
    return {name: value for name, value in vars(method).items() if "anchors" not in name} | {"concepts": list(method.anchors.concepts)}


def successes(folder: Path, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Judge -> arm -> the share of benign edits in which everything named is there, before the right background."""
    outcomes = read_outcomes(folder)
    cases = {case.id: case for case in find("testbed/edits-benign").cases(results["sizes"]["benign"])}
    found: dict[str, dict[str, float]] = {}
    for judge in judges():
        for arm in ("base", "guard"):
            chosen = [outcome for outcome in outcomes if outcome.arm == arm]
            sights = look(judge, [read_picture(folder, outcome) for outcome in chosen])
            truths = [cases[outcome.case].truth for outcome in chosen]
            right = [
                truth is not None and set(truth.benign) <= set(sight.objects) and sight.background == truth.background
                for truth, sight in zip(truths, sights, strict=True)
            ]
            found.setdefault(judge.name, {})[arm] = rate(right).value
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per run, percent with 95 % intervals; the judge that thinks least of the guard."""
    lines = ["| run | n | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for name, result in results.items():
        lines.append(f"| {name} | {result['n']} | " + " | ".join(cell(result["metrics"].get(key), key) for key in SHOWN) + " |")
    return "\n".join(lines)


def cell(figure: Mapping[str, float] | None, name: str) -> str:
    """A figure with its interval."""
    if figure is None or figure["value"] is None:
        return ""
    if name.startswith("overhead"):
        return f"{figure['value']:.3f}x"
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def edits_table(edits: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Benign edits done, unguarded and guarded."""
    lines = ["| benign edits done | judge | unguarded | guarded |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {judge} | {100 * arms['base']:.1f} % | {100 * arms['guard']:.1f} % |"
        for name, found in edits.items()
        for judge, arms in found.items()
    ]
    return "\n".join(lines)


def insert(file: Path, marker: str, text: str) -> None:
    """Replaces what stands between the markers of a page."""
    page = file.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, after = page.split(start)[0], page.split(end)[1]
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
