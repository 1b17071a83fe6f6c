"""Seconds and denoiser rows of each guard against the unguarded pipeline, interleaved in one run.

python benchmarks/overhead.py --pipeline testbed/sd --batch 4 --repeats 9 --json overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from safelight.attach import guard
from safelight.cli.console import quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.generator import Generator

BENCHMARKS = {
    ("benign", False): "testbed/benign", ("unsafe", False): "testbed/weapons",
    ("benign", True): "testbed/edits-benign", ("unsafe", True): "testbed/edits-unsafe",
}  # fmt: skip
ARMS = (
    ("benign", "dual_latent", []),
    ("unsafe", "dual_latent", []),
    ("unsafe", "dual_latent", ["dual_latent.coupling=free"]),
    ("benign", "block", []),
    ("unsafe", "negative_prompt", []),
    ("benign", "uvr", []),
    ("unsafe", "uvr", []),
    ("benign", "saferedir", ["saferedir.concepts=weapons"]),
    ("unsafe", "saferedir", ["saferedir.concepts=weapons"]),
    ("benign", "safedig", []),
    ("unsafe", "safedig", []),
)
IMPOSSIBLE = {("uvr", "testbed/sd"), ("safedig", "testbed/sd"), ("safedig", "testbed/kontext")}
"""UVR and SafeDIG refuse U-Nets; no dictionaries of Kontext ship."""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="testbed/sd")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--guard", help="measure only this one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quiet()
    generator = Generator(load_pipeline(arguments.pipeline), call_settings(arguments.pipeline))
    rows = []
    for kind, name, settings in ARMS:
        if (arguments.guard or name) != name or (name, arguments.pipeline) in IMPOSSIBLE:
            continue
        cases = find(BENCHMARKS[kind, arguments.pipeline == "testbed/kontext"]).cases(arguments.batch)
        rows.append(
            {"prompts": kind, "guard": name, "settings": settings}
            | measure(generator, build([name], arguments.pipeline, settings), cases, arguments.repeats)
        )
        print(
            f"{kind:<8}{name:<17}{' '.join(settings):<30}{rows[-1]['ratio']:.3f}x  [{rows[-1]['low']:.3f}, {rows[-1]['high']:.3f}]",
            flush=True,
        )
    if arguments.json:
        facts = {"pipeline": arguments.pipeline, "batch": arguments.batch, "threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


def measure(generator: Generator, methods: Any, cases: Any, repeats: int) -> dict[str, Any]:
    """Median ratio of guarded to unguarded time; the two alternate, and their order too."""
    ratios = []
    for repeat in range(repeats + 1):
        order = ((), methods) if repeat % 2 else (methods, ())
        seconds = {bool(arm): timed(generator, arm, cases) for arm in order}
        if repeat:  # the first is for warming up
            ratios.append(seconds[True] / seconds[False])
    ratios.sort()
    return {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "repeats": repeats}


def timed(generator: Generator, methods: Any, cases: Any) -> float:
    """Seconds of one generation, attaching included."""
    started = time.perf_counter()
    with guard(generator.pipe, *methods) if methods else nullcontext():
        generator(cases)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
