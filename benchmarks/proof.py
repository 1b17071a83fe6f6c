"""What the proof costs that a guard was in the way: provenance of embeddings, identity of parts, liveness of the generation.

python benchmarks/proof.py --repeats 31 --json proof.json

Ratios of CPU time (which other work on the machine disturbs less than the clock), each the median over runs right after one another: an idle guard with all of its checks, and
the same with the checks taken out. Their quotient is what the checks cost. Pipelines: the testbed's, and one joint and one single block of
FLUX.1 at full width (3,072), 512 x 512 pixels, 512 text tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from uvr_overhead import pipelines

from safelight import Method, guard
from safelight.cli.console import quiet
from safelight.compose import call_settings, load_pipeline
from safelight.generation import Generation
from safelight.provenance import Known, Provenance
from safelight.tap import Taps

TARGET = 1.005
TESTBED = ("testbed/sd", "testbed/sd3", "testbed/flux")
WIDE = "FLUX.1, two blocks of full width"


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--wide-repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quiet()
    rows = [measure(name, *testbed(name), arguments.repeats) for name in TESTBED]
    rows.append(measure(WIDE, *wide(), arguments.wide_repeats))
    if arguments.json:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "target": TARGET}
        arguments.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


def testbed(name: str) -> tuple[Any, Callable[[], Any]]:
    """A pipeline of the testbed, and a call of it: four images."""
    pipe, settings = load_pipeline(name), call_settings(name)
    prompts = ["a cat and a dog on the beach", "a tree on the snow", "a flower at night", "a house and a car on the meadow"]
    if isinstance(settings.get("negative_prompt"), str):
        settings["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
    return pipe, lambda: pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **settings)


def wide() -> tuple[Any, Callable[[], Any]]:
    """FLUX.1's blocks at full width, and a call of two steps."""
    pipe = pipelines(argparse.Namespace(device="cpu", dtype="float32", layers=1, single=1))["generation"]
    settings = {"height": 512, "width": 512, "num_inference_steps": 2, "max_sequence_length": 512, "output_type": "latent"}
    return pipe, lambda: pipe("a cat on the beach", generator=torch.Generator().manual_seed(0), **settings)


def measure(name: str, pipe: Any, call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Median ratios over interleaved triples, whose order rotates."""
    arms: dict[str, Callable[[], Any]] = {"bare": nullcontext, "guarded": nullcontext, "without checks": unchecked}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):
        order = list(arms)[repeat % 3 :] + list(arms)[: repeat % 3]
        for arm in order:
            with guard(pipe, Method()) if arm != "bare" else nullcontext(), arms[arm]():
                started = time.process_time()
                call()
                if repeat:  # the first is for warming up
                    seconds[arm].append(time.process_time() - started)

    def ratio(over: str, under: str) -> float:
        return statistics.median(one / other for one, other in zip(seconds[over], seconds[under], strict=True))

    row = {
        "pipeline": name, "repeats": repeats, "seconds": statistics.median(seconds["bare"]), "guarded": ratio("guarded", "bare"),
        "without_checks": ratio("without checks", "bare"), "checks": ratio("guarded", "without checks"),
        "fastest": min(seconds["guarded"]) / min(seconds["without checks"]),
    }  # fmt: skip
    print(
        f"{name:<34}{row['seconds']:7.3f} s   idle guard {row['guarded']:.4f}x   checks {row['checks']:.4f}x (fastest runs {row['fastest']:.4f}x)",
        flush=True,
    )
    return row


@contextmanager
def unchecked() -> Iterator[None]:
    """While it lasts, embeddings come from anywhere, generations are always alive, and nobody looks whether modules are the hooked ones."""
    with (
        mock.patch.object(Provenance, "check", return_value=None),
        mock.patch.object(Known, "__init__", lambda self, text, pooled=None: setattr(self, "given", text)),
        mock.patch.object(Generation, "alive", property(lambda self: self.frame is not None)),
        mock.patch.object(Taps, "stale", return_value=False),
        mock.patch("safelight.engine.check_denoiser", return_value=None),
    ):
        yield


if __name__ == "__main__":
    main()
