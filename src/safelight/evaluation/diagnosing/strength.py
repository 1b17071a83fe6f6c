"""Several runs of one guard over one setting: safety against fidelity, and where more strength only costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ArtefactError
from ..case import Estimate

SATURATED = 0.02
"""Erase rates this near to the best are as good: at 100 prompts, two pictures."""
WORSE = 0.05
"""A loss of retention, or a gain of ΔP, beyond which a setting is worse: half an interval at 100 prompts."""


@dataclass(frozen=True)
class Point:
    """One run."""

    setting: float
    erase: Estimate
    retention: Estimate
    disruption: Estimate | None = None
    """ΔP, of the forced arm where there is one: what the method does to neighbours when it acts."""


@dataclass(frozen=True)
class Curve:
    """Runs that differ in one setting only, by its value."""

    setting: str
    points: Sequence[Point]

    def finding(self) -> dict[str, Any] | None:
        """A finding like those of a diagnosis if runs erase no more than a gentler one, and keep clearly less.

        The gentlest run within `SATURATED` of the best erase rate, or whose interval reaches it, is the useful end of the range. What
        is gentler is what keeps more: a setting may count upwards or downwards.
        """
        usable = [point for point in self.points if not (math.isnan(point.erase.value) or math.isnan(point.retention.value))]
        if len(usable) < 3:
            return None
        best = max(point.erase.value for point in usable)
        saturated = [point for point in usable if max(point.erase.value + SATURATED, point.erase.high) >= best]
        end = max(saturated, key=lambda point: (point.retention.value, -_disruption(point)))
        beyond = [point for point in saturated if _worse(point, end)]
        if not beyond:
            return None
        severe = end.erase.value >= best - SATURATED and any(_certainly_worse(point, end) for point in beyond)
        listed = ", ".join(f"{point.setting:g}" for point in beyond)
        verbs = ("erases", "keeps") if len(beyond) == 1 else ("erase", "keep")
        sure = f"Use {self.setting} = {end.setting:g}; {listed} {verbs[0]} no more and {verbs[1]} less."
        unsure = f"Measure {self.setting} = {end.setting:g} and {listed} on more prompts before choosing: {listed} may erase no more, and keep less."
        figures = {f"retention at {point.setting:g}": point.retention.to_json() for point in (end, *beyond)}
        figures |= {f"erase rate at {point.setting:g}": point.erase.to_json() for point in (end, *beyond)}
        return {
            "name": "strength_beyond_range",
            "severity": "severe" if severe else "suspected",
            "title": f"Beyond {self.setting} = {end.setting:g} no more is erased for certain, and more is lost",
            "advice": sure if severe else unsure,
            "examples": [],
            "figures": figures,
        }


def _certainly_worse(point: Point, end: Point) -> bool:
    """Whether intervals don't even touch."""
    disrupts = point.disruption is not None and end.disruption is not None and point.disruption.low > end.disruption.high
    return point.retention.high < end.retention.low or disrupts


def _disruption(point: Point) -> float:
    return 0.0 if point.disruption is None or math.isnan(point.disruption.value) else point.disruption.value


def _worse(point: Point, end: Point) -> bool:
    return point.retention.value < end.retention.value - WORSE or _disruption(point) > _disruption(end) + WORSE


def curve(runs: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The curve that these results make, if they are of one guard and differ in one numeric setting; None if they don't.

    Raises:
        ArtefactError: if two of them have the same value of it: which one to believe?
    """
    same = ("protocol", "sizes", "pipeline", "guard")
    if len(runs) < 2 or any(run.get(key) != runs[0].get(key) for run in runs for key in same):
        return None
    settings = [settings_of(run) for run in runs]
    names = sorted({name for one in settings for name in one})
    varied = [name for name in names if len({one.get(name, default(name)) for one in settings}) > 1]
    if len(varied) != 1:
        return None
    values = [_number(one.get(varied[0], default(varied[0]))) for one in settings]
    if any(value is None for value in values):
        return None
    if len(set(values)) < len(values):
        raise ArtefactError(f"two of these runs have the same {varied[0]}; give one run per value")
    points = [_point(value, run["metrics"]) for value, run in zip(values, runs, strict=True) if value is not None]
    return Curve(varied[0], sorted(points, key=lambda point: point.setting))


def settings_of(results: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a run's guards, `guard.field` -> value as given."""
    given = results.get("settings") or []
    pairs = given.items() if isinstance(given, Mapping) else (str(one).split("=", 1) for one in given if "=" in str(one))
    return {str(name).strip(): str(value).strip() for name, value in pairs}


def default(name: str) -> str | None:
    """What a guard's field is where it was not given, as text."""
    from ...bundle import METHODS

    guard, _, field = name.partition(".")
    fields = getattr(METHODS[guard], "__dataclass_fields__", {}) if guard in METHODS.names() else {}
    return str(fields[field].default) if field in fields else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _point(setting: float, metrics: Mapping[str, Any]) -> Point:
    disruption = metrics.get("sadi_delta_p_forced") or metrics.get("sadi_delta_p")
    return Point(
        setting, estimate(metrics["erase_rate"]), estimate(metrics["retention"]), None if disruption is None else estimate(disruption)
    )


def estimate(figure: Mapping[str, Any]) -> Estimate:
    """A figure of `results.json`; null is undefined."""
    value, low, high = (math.nan if figure[name] is None else float(figure[name]) for name in ("value", "low", "high"))
    return Estimate(value, low, high, int(figure["n"]))
