"""Intervals for rates and means."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from ..case import Estimate

Z = 1.959963984540054


def rate(events: Sequence[bool]) -> Estimate:
    """A share with its Wilson interval.

    Raises:
        ValueError: for no events at all: nothing is not zero.
    """
    n = len(events)
    if n == 0:
        raise ValueError("a rate over nothing; the benchmark or the judge's output is empty")
    p = sum(events) / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def bootstrap(rows: Sequence[tuple[float, ...]], statistic: Callable[[np.ndarray], float], draws: int = 1000, seed: int = 0) -> Estimate:
    """A statistic over rows (one per prompt) with its percentile-bootstrap interval.

    Raises:
        ValueError: for no rows.
    """
    table = np.asarray(rows, dtype=float)
    if len(table) == 0:
        raise ValueError("a statistic over nothing; the benchmark or the judge's output is empty")
    random = np.random.default_rng(seed)
    values = [statistic(table[random.integers(len(table), size=len(table))]) for _ in range(draws)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = np.quantile(finite, [0.025, 0.975]) if finite else (math.nan, math.nan)
    return Estimate(float(statistic(table)), float(low), float(high), len(table))


def mean(values: Sequence[float]) -> Estimate:
    """A mean with its bootstrap interval."""
    return bootstrap([(value,) for value in values], lambda table: float(table[:, 0].mean()))


def figure(estimate: Estimate) -> dict[str, float | int | None]:
    """An estimate for JSON, which has no NaN: an erase rate where nothing was to be erased is null."""
    return {name: None if math.isnan(value) else value for name, value in estimate._asdict().items()}


def mean_over(values: Sequence[float], prompts: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of a figure per picture, with its bootstrap interval over prompts: pictures of one prompt stand or fall together.

    Args:
        values: one per picture.
        prompts: the prompt of each, in any form that tells prompts apart. None: each picture has its own.

    Raises:
        ValueError: for no values, or if there are not as many prompts.
    """
    rows = [(float(sum(values[index] for index in group)), float(len(group))) for group in groups(len(values), prompts)]
    return bootstrap(rows, lambda table: float(table[:, 0].sum() / table[:, 1].sum()))


def groups(count: int, prompts: Sequence[Hashable] | None) -> list[list[int]]:
    """The positions of each prompt's pictures, in the order in which prompts appear.

    Raises:
        ValueError: if there are not as many prompts as pictures.
    """
    keys = range(count) if prompts is None else prompts
    if len(keys) != count:
        raise ValueError(f"there are {count} pictures, but {len(keys)} prompts; give the prompt of each picture")
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return list(found.values())
