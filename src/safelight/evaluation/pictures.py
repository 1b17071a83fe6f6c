"""Pictures as judges and metrics take them: checked, and equal ones looked at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .judge import Judgement, Picture


def checked(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures, contiguous.

    Raises:
        ValueError: naming the first that is not [height, width, 3] of bytes.
    """
    for index, picture in enumerate(pictures):
        if (
            not isinstance(picture, np.ndarray)
            or picture.dtype != np.uint8
            or picture.ndim != 3
            or picture.shape[2] != 3
            or not picture.size
        ):
            what = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
            raise ValueError(f"picture {index} is {what}; give bytes (uint8) [height, width, 3], not empty")
    return [np.ascontiguousarray(picture) for picture in pictures]


def fingerprint(picture: Picture) -> str:
    """Equal for equal pictures."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


def judge_distinct(
    pictures: Sequence[Picture], look: Callable[[list[Picture]], Sequence[Judgement]], batch: int | None = None
) -> list[Judgement]:
    """One judgement per picture, while `look` sees each distinct one once, at most `batch` at a time.

    Raises:
        ValueError: if one is not a picture.
    """
    rows = checked(pictures)
    keys = [fingerprint(row) for row in rows]
    distinct = dict(zip(keys, rows, strict=True))
    todo = list(distinct.values())
    size = batch or max(1, len(todo))
    found = [judgement for start in range(0, len(todo), size) for judgement in look(todo[start : start + size])]
    by_key = dict(zip(distinct, found, strict=True))
    return [by_key[key] for key in keys]


def to_images(pictures: Sequence[Picture]) -> list[Any]:
    """The same as Pillow's images."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures]
