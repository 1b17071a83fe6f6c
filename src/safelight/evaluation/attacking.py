"""A whole attack on one guard: attempts, pictures, and success rates by each judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attach import guard
from ..errors import ArtefactError
from ..generator import Generator, as_bytes
from ..method import Method
from ..tables import lines_of
from ..testbed.judges import judges
from .attack import Attack, Attempt, Progress
from .case import Case
from .evaluate import look
from .metrics.estimates import figure, mean, rate
from .metrics.safety import shows_unsafe
from .runs.generate import write_png
from .success import testbed_success

ARMS = ("plain", "attack")
"""The original prompts through the guard, and what the attack made of them."""


def run_attack(
    generator: Generator, methods: Sequence[Method], attack: Attack, cases: Sequence[Case], out: Path, *,
    description: Mapping[str, Any] | None = None, progress: Progress = lambda *_: None,
) -> dict[str, Any]:  # fmt: skip
    """Attacks cases, batch by batch, and writes `attempts.jsonl`, pictures and `results.json`; interrupted runs resume.

    Raises:
        ArtefactError: if `out` holds a run of something else, or a damaged one.
        ValueError: if there is nothing unsafe to attack.
    """
    if not cases or not all(case.unsafe and case.truth is not None for case in cases):
        raise ValueError("an attack needs unsafe prompts whose content is known; take a benchmark such as testbed/weapons")
    identity = {"attack": attack.name, "fields": _fields(attack), "cases": [case.id for case in cases], **(description or {})}
    _claim(out, identity)
    done = read_attempts(out, cases)
    batch = max(1, int(getattr(attack, "batch", len(cases))))
    success = testbed_success()
    for start in range(len(done), len(cases), batch):
        some = cases[start : start + batch]
        told = f"{attack.name}, prompts {start + 1} to {start + len(some)}"
        done += attack(generator, methods, some, success, lambda _, now, of, told=told: progress(told, now, of))  # type: ignore[misc]
        _append(out, done[-len(some) :])
    pictures = {"plain": _pictures(generator, methods, cases, out / "plain", batch)}
    pictures["attack"] = _pictures(generator, methods, [attempt.case for attempt in done], out / "pictures", batch)
    results = identity | report(cases, done, pictures) | {"white_box": attack.white_box}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def report(cases: Sequence[Case], attempts: Sequence[Attempt], pictures: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The rates at which each judge, and both, see what the prompts name: `asr` under attack, `plain` without."""
    rates: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        seen = {judge.name: [shows_unsafe(c, s) for c, s in zip(cases, look(judge, pictures[arm]), strict=True)] for judge in judges()}
        seen["both"] = [all(row) for row in zip(*seen.values(), strict=True)]
        rates["asr" if arm == "attack" else arm] = {name: figure(rate(events)) for name, events in seen.items()}
    return {
        "n": len(cases),
        **rates,
        "queries": figure(mean([float(attempt.queries) for attempt in attempts])),
        "iterations": figure(mean([float(attempt.iterations) for attempt in attempts])),
    }


def read_attempts(out: Path, cases: Sequence[Case]) -> list[Attempt]:
    """The attempts of a run so far; a last line that an interruption cut short counts as not written.

    Raises:
        ArtefactError: if a line is damaged.
    """
    file = out / "attempts.jsonl"
    lines = lines_of(file)
    attempts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            case = cases[number - 1]
            if row.pop("id") != case.id:
                raise ValueError("another case was expected")
            attempts.append(Attempt(replace(case, prompt=row.pop("prompt")), **row))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            if number < len(lines):
                raise ArtefactError(f"{file}, line {number} is damaged ({error}); remove it and all that follow, and run again") from error
            file.write_bytes(b"".join(good + b"\n" for good in lines[:-1]))
    return attempts


def _append(out: Path, attempts: Sequence[Attempt]) -> None:
    with (out / "attempts.jsonl").open("a") as file:
        for attempt in attempts:
            facts = {name: getattr(attempt, name) for name in ("original", "succeeded", "queries", "iterations", "loss", "trace")}
            file.write(json.dumps({"id": attempt.case.id, "prompt": attempt.case.prompt} | facts) + "\n")


def _pictures(generator: Generator, methods: Sequence[Method], cases: Sequence[Case], folder: Path, batch: int) -> list[Any]:
    """The pictures that the guarded generator makes of prompts, which are also written."""
    made = []
    for start in range(0, len(cases), batch):
        some = cases[start : start + batch]
        with guard(generator.pipe, *methods, unjudged_images="accept"):
            images = generator(some)
        for case, image in zip(some, images, strict=True):
            write_png(image, folder / f"{case.id}.png")
            made.append(as_bytes(image))
    return made


def _fields(attack: Any) -> dict[str, Any]:
    return {name: value if isinstance(value, (int, float, str, bool, type(None))) else repr(value) for name, value in vars(attack).items()}


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Makes sure that a folder holds one run only."""
    out.mkdir(parents=True, exist_ok=True)
    file, wanted = out / "run.json", json.dumps(identity, indent=2, sort_keys=True, default=str)
    if file.is_file() and file.read_text() != wanted:
        raise ArtefactError(f"{out} holds a run with other settings (see {file}); choose another folder, or remove this one")
    file.write_text(wanted)
