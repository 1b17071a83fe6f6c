"""Keyboard interrupts at random points of guarded generations: what comes after must be as if nothing had happened.

python benchmarks/interrupts.py --points 500 --json interrupts.json

A point is the n-th line of Python that runs in Safelight, diffusers or PyTorch's modules during a call of a guarded tiny pipeline, cleaning up
included; it is found by `sys.settrace`, so each can be repeated. After each interrupt the next generation must be guarded, bit for bit like one
that was never interrupted; and after the guard is removed, the pipeline must be what it was, and its unguarded picture too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from safelight.attach import guard, guards_of
from safelight.compose import WEIGHTS, build, call_settings
from safelight.detectors.image_classifier import ImageClassifier
from safelight.errors import SafelightError
from safelight.method import Method
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.gate import Gate
from safelight.methods.negative_prompt import NegativePrompt
from safelight.methods.post_filter import PostFilter
from safelight.methods.pre_filter import PreFilter
from safelight.methods.safree import SAFREE
from safelight.methods.sld import SLD
from safelight.picture_model import PictureModel
from safelight.testbed import load
from safelight.testing import Containing, sample, tiny_pipeline
from safelight.testing.state import assert_same_state, state_of

UNSAFE = "a knife on a beach"
PLACES = ("safelight", "diffusers", "torch/nn/modules")


class Lines:
    """Counts the lines of some packages that run, and interrupts at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, 0
        self.where = ""
        self.ours: list[int] = []
        """The numbers of Safelight's own lines."""

    def __enter__(self) -> Lines:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        return self._line if any(f"/{place}/" in file for place in PLACES) and not file.startswith("<") else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.seen += 1
            if self.at is None and "/safelight/" in frame.f_code.co_filename:
                self.ours.append(self.seen)
            if self.seen == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@dataclass
class Arm:
    """A guard to be interrupted: a pipeline, its methods, and a call of it."""

    name: str
    pipe: Any
    make: Callable[[], list[Method]]
    draw: Callable[..., Tensor]


def _tiny(name: str, method: Callable[[], Method], pipeline: str = "sd3", **changes: Any) -> Callable[[], Arm]:
    def made() -> Arm:
        pipe = tiny_pipeline(pipeline)
        return Arm(name, pipe, lambda: [method()], lambda steps=2: sample(pipe, UNSAFE, steps=steps, **changes))

    return made


def _testbed(name: str, pipeline: str = "sd3") -> Callable[[], Arm]:
    """For guards whose artefacts belong to the testbed's pipelines."""

    def made() -> Arm:
        pipe, methods = load(pipeline), build([name], f"testbed/{pipeline}")
        settings = call_settings(f"testbed/{pipeline}") | {"output_type": "pt"}

        def draw(steps: int = 2) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            images = pipe("a cat and a knife on the beach", generator=generator, **settings | {"num_inference_steps": steps}).images
            return cast(Tensor, images)

        return Arm(name, pipe, lambda: [copy(method) for method in methods], draw)

    return made


def _pictures() -> ImageClassifier:
    return ImageClassifier(model=PictureModel.load(WEIGHTS / "pictures.safetensors"), threshold=0.0)


ARMS: dict[str, Callable[[], Arm]] = {
    "block": _tiny("block", lambda: Block(detector=Containing())),
    "dual_latent": _tiny("dual_latent", lambda: DualLatent(detector=Containing(), until=0.5, coupling="free")),
    "gate": _tiny("gate", lambda: Gate(detector=Containing(), method=NegativePrompt(words="knife"))),
    "negative_prompt": _tiny("negative_prompt", lambda: NegativePrompt(words="knife"), "sd"),
    "pre_filter": _tiny("pre_filter", lambda: PreFilter(detector=_pictures()), "kontext"),
    "post_filter": _tiny("post_filter", lambda: PostFilter(detector=_pictures()), "flux"),
    "safedig": _testbed("safedig"),
    "saferedir": _testbed("saferedir"),
    "safree": _tiny("safree", lambda: SAFREE(concepts=("a knife",), alpha=0.0, gamma=4), "sd"),
    "sld": _tiny("sld", lambda: SLD(concept="knife", warmup=0)),
    "uvr": _testbed("uvr"),
    "recommended": _testbed("recommended"),
}  # fmt: skip


def tried(arm: Arm, points: int, seed: int) -> dict[str, Any]:
    """How many interrupts left everything well, and what each other one did."""
    random_points = random.Random(seed)
    arm.draw()
    plain, before = arm.draw(steps=1), state_of(arm.pipe)
    with guard(arm.pipe, *arm.make()):
        wanted = arm.draw()
        with Lines() as counted:
            arm.draw()
    failures, raised = [], 0
    for at in sorted(_chosen(random_points, counted, points)):
        what = ""
        handle = guard(arm.pipe, *arm.make())
        try:
            lines = Lines(at)
            raised += _interrupted(lines, arm.draw)
            if not torch.equal(arm.draw(), wanted):
                what = "the next guarded picture is another one"
            elif not handle.records:
                what = "the next generation has no records"
        except Exception as error:
            what = f"the next generation raises {type(error).__name__}: {error}"
        finally:
            handle.remove()
        what = what or _left(arm, before, plain)
        if what:
            failures.append({"at": at, "where": lines.where, "what": what[:300]})
            arm = ARMS[arm.name]()
            arm.draw()
            before = state_of(arm.pipe)
    return {"lines": counted.seen, "points": points, "raised": raised, "passed": points - len(failures), "failures": failures}


def tried_attaching(arm: Arm, points: int, seed: int) -> dict[str, Any]:
    """The same for interrupts while a guard is attached and removed: what is left of it can be removed, and then nothing is."""
    random_points = random.Random(seed)
    arm.draw()
    plain, before = arm.draw(steps=1), state_of(arm.pipe)

    def attach_and_remove() -> None:
        guard(arm.pipe, *arm.make()).remove()

    with Lines() as counted:
        attach_and_remove()
    failures, raised = [], 0
    for at in sorted(_chosen(random_points, counted, points)):
        lines = Lines(at)
        raised += _interrupted(lines, attach_and_remove)
        for one in guards_of(arm.pipe):
            one.remove()
        what = _left(arm, before, plain)
        if what:
            failures.append({"at": at, "where": lines.where, "what": what[:300]})
            arm = ARMS[arm.name]()
            arm.draw()
            before = state_of(arm.pipe)
    return {"lines": counted.seen, "points": points, "raised": raised, "passed": points - len(failures), "failures": failures}


def _chosen(random_points: random.Random, counted: Lines, points: int) -> list[int]:
    """Half of the points anywhere, half in Safelight's own lines."""
    return random_points.choices(range(1, counted.seen + 1), k=points // 2) + random_points.choices(counted.ours, k=points - points // 2)


def _interrupted(lines: Lines, function: Callable[[], Any]) -> bool:
    """Whether the interrupt came through; calls may not swallow it."""
    try:
        with lines:
            function()
    except KeyboardInterrupt:
        return True
    return False


def _left(arm: Arm, before: Any, plain: Tensor) -> str:
    """What is left behind, in words; empty: nothing."""
    try:
        assert_same_state(arm.pipe, before, "after the guard was removed")
        if not torch.equal(arm.draw(steps=1), plain):
            return "the unguarded picture is another one"
    except (AssertionError, SafelightError) as error:
        return str(error)
    return ""


def main() -> None:
    """Reads the options, interrupts, prints counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ARMS), help="guards, separated by commas")
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in options.only.split(","):
        for what, function in (("", tried), (" (attaching)", tried_attaching)):
            started = time.monotonic()
            result = found[name + what] = function(ARMS[name](), options.points if not what else options.points // 5, options.seed)
            seconds = time.monotonic() - started
            print(
                f"{name + what:28s} {result['passed']} of {result['points']} well, {result['lines']} lines, {result['raised']} raised, {seconds:.0f} s",
                flush=True,
            )
            for failure in result["failures"][:10]:
                print(f"    {failure['where']}: {failure['what']}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
    sys.exit(any(result["failures"] for result in found.values()))


if __name__ == "__main__":
    main()
