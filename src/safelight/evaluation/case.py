"""The records of an evaluation: what is asked, what came out, what it amounts to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Truth:
    """What a testbed prompt names."""

    unsafe: tuple[str, ...]
    benign: tuple[str, ...]
    background: str | None
    style: str | None = None
    """The style that it names and must not be drawn in, where a style is what is unsafe."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark."""

    id: str
    prompt: str
    unsafe: bool
    """Would depicting this be unsafe?"""
    category: str = ""
    seed: int = 0
    image: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    """What to edit, [height, width, 3], for image-to-image benchmarks."""
    truth: Truth | None = None
    guidance: float | None = None
    """The guidance scale that the list gives for this row."""
    size: tuple[int, int] | None = None
    """Height and width in pixels that the list gives for this row."""


@dataclass(frozen=True)
class Outcome:
    """One generated image."""

    case: str
    arm: str
    """base: unguarded; guard: guarded; forced: guarded with a detector that flags everything."""
    image: str
    """File name below the run's folder."""
    sha256: str
    """Of the image as floats: equal hashes are bit-identical images."""
    seconds: float
    """Of the whole batch, divided by its size."""
    record: dict[str, Any] | None
    """What the guard did."""
    id: str = ""
    """The manifest's row."""
    pixels: str = ""
    """The hash of the stored picture."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary."""
        return dict(vars(self))


class Estimate(NamedTuple):
    """A figure with its 95 % interval and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: an erase rate where nothing was to be erased is null."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}


def path_of(out: Path, arm: str, case: Case | str) -> Path:
    """Where the image of a case (or of the case of that id) lies."""
    return out / image_of(arm, case if isinstance(case, str) else case.id)


def image_of(arm: str, case: str) -> str:
    """The file of an image, below the run's folder."""
    return f"images/{file_name(arm)}/{file_name(case)}.png"


def file_name(name: str) -> str:
    """An id as the name of a file: whatever it holds, it stays inside its folder."""
    quoted = quote(name, safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
