"""The first pass: images, each beside a line of JSON. Interrupted runs resume."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...attach import guard
from ...compose import load_pipeline
from ...errors import ArtefactError
from ...generator import Generator, as_bytes
from ...method import Method
from ..case import Case, Outcome, image_of
from .arms import Arm, pipeline_artefacts
from .durable import write_atomically
from .fingerprint import DIGITS, described, digest_array
from .manifest import Batch, Header, Row, plan
from .sources import Pixels, as_png
from .store import Made, opened, read_outcomes, read_picture

__all__ = ["Arms", "Generator", "Maker", "generate", "generate_shard", "read_outcomes", "read_picture", "write_png"]

Arms = Mapping[str, Sequence[Method]]


@dataclass(frozen=True)
class Maker:
    """A loaded pipeline with the guards of each arm: turns batches of rows into images."""

    generator: Generator
    """Its settings are those of rows that say nothing else."""
    arms: Arms

    @classmethod
    def load(cls, header: Header, device: str = "auto") -> Maker:
        """Loads a manifest's pipeline and builds its guards, by their descriptions.

        Raises:
            ArtefactError: if something is missing, or has changed since the manifest was planned.
        """
        arms = built(header)
        pipe = load_pipeline(header.pipeline)
        pipe.set_progress_bar_config(disable=True)
        place = device_named(device)
        return cls(Generator(pipe if place == "cpu" else pipe.to(place), {}), arms)

    def __call__(self, rows: Batch, sources: Mapping[str, Pixels]) -> list[Made]:
        """Images of rows of one arm, generated in one call."""
        arm, cases = rows[0].arm, [row.to_case(sources) for row in rows]
        methods = self.arms[arm]
        attached = guard(self.generator.pipe, *methods, unjudged_images="accept") if methods else None
        with attached if attached is not None else nullcontext():
            started = time.perf_counter()
            images = self._set(rows[0].settings)(cases)
            seconds = (time.perf_counter() - started) / len(cases)
        records = [record.to_json() for record in attached.records] if attached is not None else [None] * len(cases)
        return [_made(row, image, seconds, record) for row, image, record in zip(rows, images, records, strict=True)]

    def _set(self, settings: Mapping[str, Any]) -> Generator:
        """The generator with a row's settings. Those that it has anyway stay the objects they are: JSON may have simplified them."""
        own = self.generator.settings
        changed = {name: value for name, value in settings.items() if name not in own or described(own[name]) != value}
        return replace(self.generator, settings={**own, **changed}) if changed else self.generator


def built(header: Header) -> Arms:
    """The guards of a manifest's arms.

    Raises:
        ArtefactError: if something is missing, or has changed since the manifest was planned.
    """
    found = pipeline_artefacts(header.pipeline)
    if changed := [name for name in {*found, *header.artefacts} if found.get(name) != header.artefacts.get(name)]:
        raise ArtefactError(
            f"{header.pipeline} is not what it was when the manifest was planned ({min(changed)} differs); "
            "put it back, or plan again into another folder"
        )
    return {name: arm.build(header.pipeline) for name, arm in header.arms.items()}


def _made(row: Row, image: Any, seconds: float, record: dict[str, Any] | None) -> Made:
    hashed = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:DIGITS]
    stored = as_bytes(image)
    return Made(
        Outcome(row.case, row.arm, image_of(row.arm, row.case), hashed, seconds, record, row.id, digest_array(stored)), as_png(stored)
    )


def write_png(image: NDArray[np.float32], path: Path) -> None:
    """Writes an image [height, width, 3] in 0..1, atomically."""
    write_atomically(path, as_png(as_bytes(image)))


def device_named(name: str) -> str:
    """Where a pipeline goes: `auto` is a GPU if there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def generate_shard(batches: Iterable[Batch], make: Maker, sources: Mapping[str, Pixels]) -> Iterator[list[Made]]:
    """The work itself, the same under every engine: makes batch after batch, each of them whole."""
    for batch in batches:
        yield make(batch, sources)


def generate(
    generator: Generator, cases: Sequence[Case], arms: Arms, out: Path, batch: int = 8, advance: Callable[[int], None] = lambda _: None,
    *, pipeline: str = "", protocol: str = "", version: str = "1",
) -> Iterator[Outcome]:  # fmt: skip
    """Generates every case under every arm, batch by batch, the arms of a batch one after the other (so that timings compare).

    For pipelines and methods that are objects already; `Maker.load` is for those that are named. Finished batches are skipped: an image is
    finished when its line is in `outcomes.jsonl`, and is written before that line.

    Raises:
        ArtefactError: if `out` is in use, damaged, or holds something else.
    """
    described_arms = {name: Arm.of(methods) for name, methods in arms.items()}
    manifest, images = plan(
        cases, described_arms, pipeline=pipeline or type(generator.pipe).__name__, settings=generator.settings, protocol=protocol,
        version=version, batch=batch,
    )  # fmt: skip
    make = Maker(generator, arms)
    with opened(out, manifest) as store:
        store.sources.add(images)
        for rows in (batch for together in manifest.rounds() for batch in together):
            for made in generate_shard(store.unfinished([rows]), make, images):
                store.keep(made)
            yield from (store.done[row.id] for row in rows)
            advance(len(rows))
