"""The first pass: images, each beside a line of JSON. Interrupted runs resume."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..attach import guard
from ..errors import ArtefactError
from ..generator import Generator, as_bytes
from ..method import Method
from .case import Case, Outcome, path_of

Arms = Mapping[str, Sequence[Method]]


def generate(
    generator: Generator, cases: Sequence[Case], arms: Arms, out: Path, batch: int = 8, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Outcome]:  # fmt: skip
    """Generates every case under every arm, batch by batch, the arms of a batch one after the other (so that timings compare).

    Finished batches are skipped: an image is finished when its line is in `outcomes.jsonl`, and is written before that line.
    """
    done = {(outcome.arm, outcome.case): outcome for outcome in read_outcomes(out)}
    for start in range(0, len(cases), batch):
        chosen = cases[start : start + batch]
        for arm, methods in arms.items():
            finished = [done[arm, case.id] for case in chosen if (arm, case.id) in done]
            yield from finished if len(finished) == len(chosen) else _generate_batch(generator, chosen, arm, methods, out)
            advance(len(chosen))


def _generate_batch(generator: Generator, cases: Sequence[Case], arm: str, methods: Sequence[Method], out: Path) -> list[Outcome]:
    attached = guard(generator.pipe, *methods) if methods else None
    with attached if attached is not None else nullcontext():
        started = time.perf_counter()
        images = generator(cases)
        seconds = (time.perf_counter() - started) / len(cases)
    records = [record.to_json() for record in attached.records] if attached is not None else [None] * len(cases)
    outcomes = []
    for case, image, record in zip(cases, images, records, strict=True):
        path = path_of(out, arm, case)
        write_png(image, path)
        digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:24]
        outcomes.append(Outcome(case.id, arm, str(path.relative_to(out)), digest, seconds, record))
    with (out / "outcomes.jsonl").open("a") as file:
        file.writelines(json.dumps(outcome.to_json()) + "\n" for outcome in outcomes)
        file.flush()
        os.fsync(file.fileno())
    return outcomes


def write_png(image: NDArray[np.float32], path: Path) -> None:
    """Writes an image [height, width, 3] in 0..1, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    Image.fromarray(as_bytes(image)).save(partial, "PNG")
    partial.replace(path)


def read_outcomes(out: Path) -> list[Outcome]:
    """All outcomes of a run so far; a line that an interruption cut short counts as not written."""
    file = out / "outcomes.jsonl"
    if not file.is_file():
        return []
    lines = file.read_text().splitlines()
    outcomes = []
    for number, line in enumerate(lines, 1):
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ArtefactError(
                    f"{file}, line {number} is damaged ({error}); remove that line, and the run will make its image again"
                ) from error
            file.write_text("".join(f"{good}\n" for good in lines[:-1]))
    return outcomes


def read_picture(out: Path, outcome: Outcome) -> NDArray[np.uint8]:
    """The stored image of an outcome, [height, width, 3].

    Raises:
        ArtefactError: if it is gone or damaged.
    """
    return read_png(out / outcome.image)


def read_png(path: Path) -> NDArray[np.uint8]:
    """A stored image, [height, width, 3].

    Raises:
        ArtefactError: if it is gone or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ArtefactError(f"{path} can't be read ({error}); remove its line from outcomes.jsonl to make it again") from error
