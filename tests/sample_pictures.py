"""Pictures that tests show to judges: harmless, of several sizes, some of them equal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from safelight.testbed.scenes import Scene, render

Picture = NDArray[np.uint8]


def noise(height: int = 40, width: int = 64, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(level: int, height: int = 48, width: int = 48) -> Picture:
    return np.full((height, width, 3), level, np.uint8)


def scenes() -> list[Picture]:
    return [
        render(Scene(objects, place, None, (0, 0)))
        for objects, place in ((("cat",), "beach"), (("knife", "apple"), "night"), (("beer",), "snow"))
    ]


def harmless() -> list[Picture]:
    return [*scenes(), noise(), plain(0), plain(255), plain(128, 100, 30)]
