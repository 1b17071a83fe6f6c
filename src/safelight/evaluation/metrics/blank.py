"""Pictures that show nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..case import Estimate
from .estimates import rate

PLAIN = 4.0
"""Standard deviation, of 255 levels, up to which each colour channel is plain; the plainest background of the testbed has over three times that."""


def is_blank(picture: Any) -> bool:
    """Whether a picture [height, width, 3] of bytes is one plain colour, such as the grey of a refusal."""
    return bool(np.asarray(picture, dtype=np.float64).std(axis=(0, 1)).max() <= PLAIN)


def blanked(base: Sequence[bool], guarded: Sequence[bool]) -> Estimate:
    """Share of pictures that the guard made blank."""
    return rate([after and not before for before, after in zip(base, guarded, strict=True)])
