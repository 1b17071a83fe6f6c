"""What to collect from: prompts that show a concept, and benign ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..tables import Row, read_table
from ..testbed.captions import apply_edit, caption
from ..testbed.scenes import Scene, render, sample_jitter
from ..testbed.world import BACKGROUNDS, DOMAINS, PROXIMAL, SAFE

FIRST_SEED = 2
"""Of the first row without a seed; the next ones count upwards."""
NEEDED_BY = "a list of examples"
COLUMNS = ("concept", "word", "seed", "image", "mask")
"""Besides the prompt."""


@dataclass(frozen=True)
class Example:
    """A prompt, and where the concept that it shows will be."""

    prompt: str
    seed: int
    concept: str | None = None
    """None: benign."""
    word: str = ""
    """How the prompt calls the concept; self-localisation looks for that word."""
    image: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    """What to edit, [height, width, 3]."""
    mask: Path | None = None
    """A picture that is light where the concept is in the generated image."""


def read_examples(path: Path) -> list[Example]:
    """Examples from a table with the columns prompt and concept (empty: benign), and optionally word, seed, image and mask.

    Raises:
        ValueError: naming the file, the row, and what is wrong with it.
    """
    table = read_table(path)
    table.column(("concept",), NEEDED_BY, besides=COLUMNS)
    prompts = table.required("prompt", needed_by=NEEDED_BY)
    values = zip(*(table.optional(name, besides=("prompt", *COLUMNS)) for name in COLUMNS), strict=True)
    return [
        _example(path.parent, table.where(index), prompt, dict(zip(COLUMNS, own, strict=True)), FIRST_SEED + index)
        for index, ((prompt,), own) in enumerate(zip(prompts, values, strict=True))
    ]


def _example(folder: Path, where: str, prompt: str, values: Row, own_seed: int) -> Example:
    seed = values["seed"] or str(own_seed)
    if not re.fullmatch("[0-9]{1,18}", seed):
        raise ValueError(f"{where}: the seed {seed!r} is not a whole number; give digits, at most 18, or none at all")
    files = {name: folder / values[name] for name in ("image", "mask") if values[name]}
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"{where}: there is no {name} {file}; paths start from the table's folder")
    return Example(
        prompt, int(seed), values["concept"] or None, values["word"] or values["concept"],
        np.asarray(Image.open(files["image"]).convert("RGB")) if "image" in files else None, files.get("mask"),
    )  # fmt: skip


def from_testbed(
    domains: Sequence[str], *, unsafe: int, benign: int, editing: bool = False, keeping: bool = False, seed: int = 0
) -> list[Example]:  # fmt: skip
    """Examples of the testbed's training split, in plain names: so many of each unsafe object, and so many benign ones.

    Edits bring the object in; with `keeping`, they keep the one that is in their source, and change something else.
    """
    random = Random(f"examples/{','.join(domains)}/{editing}/{seed}")
    objects = [name for domain in domains for name in DOMAINS[domain]]
    near = [name for domain in domains for name in PROXIMAL[domain]]
    draw = partial(_draw_edit, keeping) if editing else _draw_scene
    examples = [made for name in objects for made in _take(unsafe, lambda name=name: draw(random, name))]  # type: ignore[misc]
    examples += _take(benign, lambda: draw(random, None, random.choice(near) if random.random() < 0.3 else random.choice(SAFE)))
    return [Example(e.prompt, 10_000 * (seed + 1) + i, e.concept, e.word, e.image) for i, e in enumerate(examples)]


def _take(count: int, draw: Callable[[], Example | None]) -> list[Example]:
    found: list[Example] = []
    while len(found) < count:
        example = draw()
        if example is not None:
            found.append(example)
    return found


def _draw_scene(random: Random, unsafe: str | None, safe: str = "") -> Example | None:
    names = [unsafe or safe]
    if random.random() < 0.7:
        names.insert(random.randrange(2), random.choice([name for name in SAFE if name != safe]))
    scene = Scene(tuple(names), random.choice(tuple(BACKGROUNDS)), None, sample_jitter(random))
    return Example(caption(scene, random.randrange(4)), 0, unsafe, unsafe or "") if scene.split == "train" else None


def _draw_edit(keeping: bool, random: Random, unsafe: str | None, safe: str = "") -> Example | None:
    """Brings an object in, or keeps the one that is there."""
    shown, others = unsafe or safe, random.sample([name for name in SAFE if name != safe], 2)
    place = random.randrange(2)
    keeps = keeping or (unsafe is None and random.random() < 0.5)  # benign edits are of all kinds
    operation: Any = random.choice(("replace", "background") if keeps else ("replace", "add"))
    objects: list[str | None] = [shown if keeps else others[0], others[1]]
    target = 1 if keeps else 0  # what is changed
    if operation == "add":
        objects[target] = None
    if place:
        objects, target = objects[::-1], 1 - target
    source = Scene(tuple(objects), random.choice(tuple(BACKGROUNDS)), None, sample_jitter(random))
    fresh = random.choice([name for name in SAFE if name not in objects])
    edit = apply_edit(random, source, operation, target, new=fresh if keeps else shown)
    if "train" not in (source.split, edit.target.split) or {source.split, edit.target.split} - {"train"}:
        return None
    return Example(edit.instruction, 0, unsafe, "" if keeps else (unsafe or ""), render(source))


def halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to collect from, and others to calibrate with: every second one of each concept."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    counts: dict[str | None, int] = {}
    for example in examples:
        parts[counts.get(example.concept, 0) % 2].append(example)
        counts[example.concept] = counts.get(example.concept, 0) + 1
    return parts


def digest(examples: Sequence[Example]) -> str:
    """What identifies a list of examples, pictures to edit included."""
    parts = (f"{e.prompt}|{e.seed}|{e.concept}|".encode() + (b"" if e.image is None else e.image.tobytes()) for e in examples)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def name_of(index: int) -> str:
    """The name of an example's file."""
    return f"{index:06d}"
