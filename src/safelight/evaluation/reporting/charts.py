"""Where things stand on a plot: positions only, drawn by the templates as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..case import Estimate
from .labels import number

Spot = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A range of values along a line of some length."""

    low: float
    high: float
    length: float = 100.0
    share: bool = True
    flipped: bool = False
    """Whether larger values stand nearer to the beginning, as on the upright axis of an SVG."""

    def at(self, value: float) -> float:
        """Where a value stands; what lies outside stands at the end."""
        part = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.length * (1 - part if self.flipped else part), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values with their places, at most seven."""
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        values = [step * index for index in range(first, first + 8) if step * index <= self.high + 1e-9 * step]
        return [(self.at(value), number(value, self.share)) for value in values]


def _round_step(rough: float) -> float:
    """The nearest of 1, 2, 2.5, 5 times a power of ten from above."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough - 1e-12)


NEAR = 1e-3
"""What a value may be outside of a range of shares and be drawn at its end: cosines are a little off 0 and 1."""


def axis(
    estimates: Sequence[Estimate], share: bool, *, length: float = 100.0, flipped: bool = False, through: Sequence[float] = (),
    fitted: bool = False,
) -> Axis:  # fmt: skip
    """An axis that holds all intervals: from 0 to 1 for shares unless something lies outside, or fitted to the next round values."""
    ends = [value for one in estimates for value in (one.value, one.low, one.high) if not math.isnan(value)] + list(through)
    if share and not fitted:
        low, high = min([0.0, *ends]), max([1.0, *ends])
        return Axis(math.floor((low + NEAR) * 4) / 4, math.ceil((high - NEAR) * 4) / 4, length, True, flipped)
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    if high - low < NEAR:
        low, high = (high - 0.1, high) if share else (low, low + 1)
    step = _round_step((high - low) / 4)
    return Axis(math.floor((low + NEAR * step) / step) * step, math.ceil((high - NEAR * step) / step) * step, length, share, flipped)


@dataclass(frozen=True)
class Mark:
    """A dot with its whiskers."""

    value: float
    low: float
    high: float
    kind: str = "guard"
    """Its look: base (hollow), guard, or the number of a series."""
    title: str = ""


def mark(estimate: Estimate, on: Axis, kind: str = "guard", title: str = "") -> Mark | None:
    """A figure on an axis; none if it is undefined. Without an interval the whiskers have no length."""
    if math.isnan(estimate.value):
        return None
    low, high = (estimate.value if math.isnan(end) else end for end in (estimate.low, estimate.high))
    ends = sorted((on.at(low), on.at(high)))
    return Mark(on.at(estimate.value), ends[0], ends[1], kind, title)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones that are at least a gap apart and inside the range, in the given order; for labels beside points.

    If all don't fit, they are set evenly over the range.
    """
    if gap * (len(wanted) - 1) > high - low:
        gap = (high - low) / max(1, len(wanted) - 1)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [0.0] * len(wanted)
    below = low - gap
    for index in order:
        places[index] = below = max(wanted[index], below + gap)
    above = high + gap
    for index in reversed(order):
        places[index] = above = min(places[index], above - gap)
    return [round(place, 2) for place in places]


def pareto(points: Sequence[Spot]) -> list[int]:
    """Which points no other is at least as good as in both, and better in one; smaller is better. In the order of the first value."""

    def beaten(own: Spot) -> bool:
        return any(other[0] <= own[0] and other[1] <= own[1] and other != own for other in points)

    return sorted((index for index, own in enumerate(points) if not beaten(own)), key=lambda index: points[index])


def steps(front: Sequence[Spot]) -> str:
    """The path of a front as a staircase, on axes that grow downwards and to the right."""
    if not front:
        return ""
    path = [f"M{front[0][0]:g},{front[0][1]:g}"]
    for x, y in front[1:]:
        path += [f"H{x:g}", f"V{y:g}"]
    return " ".join(path)
