"""A curve over strength, as plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..case import Estimate
from ..diagnosing.strength import Curve
from .charts import Axis, Mark, axis, mark
from .run_page import UNDEFINED

WIDE, HIGH = 300.0, 200.0
NEAR = 10.0
"""Points nearer to each other than this would write over each other."""
Drawn = tuple[str, Mark, Mark]
"""What is written beside a point, and its place along x and y."""


@dataclass(frozen=True)
class Plot:
    """A drawing with an axis along the bottom and one up the side."""

    title: str
    x_title: str
    y_title: str
    x: Axis
    y: Axis
    series: Sequence[tuple[str, str, Sequence[Drawn]]]
    """Name, look, and points: what is written beside each, and its place along x and y."""


def curve_plots(found: Curve) -> list[Plot]:
    """Erasure against retention; and erasure, retention and ΔP over the setting."""
    erase, kept = ([getattr(point, name) for point in found.points] for name in ("erase", "retention"))
    x, y = axis(erase, True, length=WIDE, fitted=True), axis(kept, True, length=HIGH, flipped=True, fitted=True)
    trade = _drawn([(f"{p.setting:g}", mark(p.erase, x), mark(p.retention, y)) for p in found.points])
    over = {"erase rate": erase, "retention": kept}
    if all(point.disruption is not None for point in found.points):
        over["ΔP"] = [point.disruption or UNDEFINED for point in found.points]
    values = [point.setting for point in found.points]
    along, up = (
        Axis(min(values), max(values), WIDE, False),
        axis([one for each in over.values() for one in each], True, length=HIGH, flipped=True),
    )
    series = [
        (
            name,
            f"s{index}",
            _drawn([("", mark(Estimate(value, value, value, 1), along), mark(one, up)) for value, one in zip(values, each)]),
        )
        for index, (name, each) in enumerate(over.items())
    ]
    return [
        Plot("Safety against fidelity", "erase rate", "retention", x, y, [("", "guard", together(trade))]),
        Plot(f"Over {found.setting}", found.setting, "", along, up, series),
    ]


def _drawn(points: Sequence[tuple[str, Mark | None, Mark | None]]) -> list[Drawn]:
    return [(told, x, y) for told, x, y in points if x is not None and y is not None]


def together(points: Sequence[Drawn]) -> list[Drawn]:
    """Points with what is written beside them; where several share a place, the first says it for all."""
    told: list[Drawn] = []
    for index, (_, x, y) in enumerate(points):
        same = [text for text, x1, y1 in points if abs(x1.value - x.value) < NEAR and abs(y1.value - y.value) < NEAR]
        first = next(i for i, (_, x1, y1) in enumerate(points) if abs(x1.value - x.value) < NEAR and abs(y1.value - y.value) < NEAR)
        told.append((", ".join(same) if first == index else "", x, y))
    return told
