"""Activations of prompt pairs, recorded at several sites while a frozen model makes their pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..attach import guard
from ..backbone import Backbone
from ..bank import Pair
from ..errors import ArtefactError
from ..generator import Generator, as_bytes
from ..site import Site
from .capture import Capture
from .examples import Example, digest, name_of
from .shards import Shards
from .trajectories import workers

Progress = Callable[[str, int, int], None]
THUMBNAIL = 64
"""Pixels of the pictures that are kept to be looked at."""


@dataclass(frozen=True)
class Sampling:
    """What is kept of each picture."""

    sites: tuple[str, ...]
    """e.g. `prompt:text`, `joint.18:image`."""
    times: int = 5
    """Evenly spread steps, the first among them; published: every 6th of 30."""
    tokens: int | None = None
    """So many tokens of each site, chosen at random and the same for both members of a pair; None: all."""


def examples_of(pairs: Sequence[Pair], seeds: int = 1) -> list[Example]:
    """Both members of each pair under the same seed, one after the other; the unsafe one first."""
    found = []
    for number, pair in enumerate(pairs):
        for seed in range(seeds):
            start = 200_000 + number * seeds + seed
            found += [Example(pair.unsafe, start, pair.category), Example(pair.safe, start)]
    return found


def steps_of(total: int, times: int) -> list[int]:
    """The steps that are recorded.

    Raises:
        ValueError: if there are fewer steps than times.
    """
    if not 1 <= times <= total:
        raise ValueError(f"{times} time points can't be taken from {total} steps; choose between 1 and {total}")
    return [index * total // times for index in range(times)]


def record(
    generator: Generator, examples: Sequence[Example], sampling: Sampling, out: Path, *, batch: int = 8, progress: Progress = lambda *_: None
) -> Shards:  # fmt: skip
    """Makes the examples with the plain model, conditional rows only; one file per example, so that an interrupted recording goes on.

    Only one batch is in memory at a time. Under `accelerate launch`, processes share the batches; each returns when all are done.

    Raises:
        ArtefactError: if the folder holds another recording.
        ValueError: if the model has no such site, or too few steps.
    """
    backbone = Backbone.of(generator.pipe)
    for site in sampling.sites:
        backbone.locate(_with_stream(site))
    total = steps_wanted(generator)
    kept = steps_of(total, sampling.times)
    identity = {
        "examples": digest(examples), "count": len(examples), "sites": list(sampling.sites), "steps": kept, "total": total,
        "tokens": sampling.tokens,
    }  # fmt: skip
    shards, crew = Shards(out, identity), workers()
    recorder = Capture(at=list(sampling.sites), steps=kept)
    for start in range(0, len(examples), batch)[crew.process_index :: crew.num_processes]:
        progress("recording", start, len(examples))
        chosen = range(start, min(start + batch, len(examples)))
        if all(name_of(i) in shards for i in chosen):
            continue  # batches are made whole: in another company, the last bit of a row may differ
        with guard(generator.pipe, recorder, unjudged_images="accept"):
            pictures = generator([examples[i] for i in chosen])
        for place, i in enumerate(chosen):
            shards.write(name_of(i), _parts(recorder, sampling, place, examples[i], pictures[place]))
    crew.wait_for_everyone()
    progress("recording", len(examples), len(examples))
    return shards


def _with_stream(site: str) -> Site:
    parsed = Site.parse(site)
    if parsed.stream is None:
        raise ValueError(f"'{site}' names an attention, which holds no activations; write e.g. '{site}:image'")
    return parsed


def steps_wanted(generator: Generator) -> int:
    """How many steps the pipeline will make."""
    given = generator.settings.get("num_inference_steps")
    return int(given or inspect.signature(type(generator.pipe).__call__).parameters["num_inference_steps"].default)


def _parts(recorder: Capture, sampling: Sampling, place: int, example: Example, picture: Any) -> dict[str, Tensor]:
    """What is stored of one picture."""
    parts = {"picture": thumbnail(picture), "unsafe": torch.tensor(bool(example.concept))}
    for site in sampling.sites:
        tokens = recorder.of(site, place)  # [times, tokens, width]
        if sampling.tokens is not None and sampling.tokens < tokens.shape[1]:
            chosen = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(example.seed))[: sampling.tokens].sort().values
            tokens = tokens[:, chosen]
        parts[site] = tokens
    return parts


def thumbnail(picture: Any) -> Tensor:
    """A picture [height, width, 3] in 0..1, made small, as bytes."""
    image = Image.fromarray(as_bytes(picture))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return torch.from_numpy(np.array(image))


def read_site(shards: Shards, site: str, indices: Sequence[int]) -> Tensor:
    """The activations of some examples at a site, [examples, times, tokens, width], in half precision.

    Raises:
        ArtefactError: if a file is missing or damaged (the message names it), or has no such site.
    """
    parts = []
    for index in indices:
        stored = shards.read(name_of(index))
        if site not in stored:
            sites = ", ".join(name for name in stored if name not in ("picture", "unsafe"))
            raise ArtefactError(f"{shards.folder} holds no activations of '{site}', but of {sites}; record that site too")
        parts.append(stored[site])
    return torch.stack(parts)
