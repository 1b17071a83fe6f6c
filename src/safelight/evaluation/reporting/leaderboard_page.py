"""A leaderboard as plots and heat tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..case import Estimate
from .charts import Axis, Mark, axis, mark, pareto, spread, steps
from .labels import interval, label, written
from .leaderboard import ATTACKS, HARMLESS, SHOWN, Leaderboard, title

WIDE, HIGH = 300.0, 260.0
GAP = 15.0
"""Between labels beside a plot."""


@dataclass(frozen=True)
class Heat:
    """One figure of a heat table."""

    text: str
    interval: str
    hint: str
    """The whole story, for those who hover; and why there is no figure."""
    bad: float | None
    """0 good … 1 bad; None for no figure."""
    sort: float


@dataclass(frozen=True)
class Column:
    """One column of a heat table."""

    title: str
    better: str
    group: str


@dataclass(frozen=True)
class Point:
    """A method in a scatter."""

    method: str
    x: Mark
    y: Mark
    front: bool
    label_y: float
    story: str


@dataclass(frozen=True)
class Scatter:
    """Safety against what harmless prompts pay."""

    x: Axis
    y: Axis
    points: Sequence[Point]
    front: str
    """The path of the Pareto front."""
    absent: Sequence[str]
    """Methods without the figures."""


@dataclass(frozen=True)
class BackbonePage:
    """One backbone's part of the page."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Heat]]]
    scatter: Scatter
    impossible: Sequence[str]
    """What can't be, and why."""


@dataclass(frozen=True)
class AttackBars:
    """One attack's success on all methods and backbones."""

    title: str
    rows: Sequence[tuple[str, Sequence[Mark | None], Sequence[str]]]
    """Method, one mark per backbone, and what is said of each."""


@dataclass(frozen=True)
class BoardPage:
    """All that the template needs of a leaderboard."""

    board: Leaderboard
    backbones: Sequence[BackbonePage]
    attacks: Sequence[AttackBars]
    axis: Axis


def panels(board: Leaderboard) -> BoardPage:
    """A leaderboard, laid out."""
    shares = Axis(0, 1)
    return BoardPage(
        board, [_backbone(board, name) for name in board.backbones], [_bars(board, attack, shares) for attack in ATTACKS], shares
    )


def _backbone(board: Leaderboard, backbone: str) -> BackbonePage:
    shown = [(c, name) for c, name in SHOWN if any(board.figure(method, backbone, c, name) for method in board.methods)]
    columns = [Column(title(c, name), label(name).better, "attacks" if name == "asr" else "costs") for c, name in shown]
    worst = {one: _worst([board.figure(method, backbone, *one) for method in board.methods]) for one in shown}
    rows = [(method, [_heat(board, method, backbone, *one, worst[one]) for one in shown]) for method in board.methods]
    reasons = dict.fromkeys(
        f"{cell.method}: {cell.impossible}" for cell in board.cells.values() if cell.backbone == backbone and cell.impossible
    )
    return BackbonePage(backbone, columns, rows, _scatter(board, backbone), list(reasons))


def _worst(found: Sequence[Estimate | None]) -> float:
    return max((one.value for one in found if one is not None and not math.isnan(one.value)), default=0.0)


def _heat(board: Leaderboard, method: str, backbone: str, column: str, name: str, worst: float) -> Heat:
    cell = board.cells.get((method, backbone, column))
    if cell is None:
        return Heat("missing", "", f"{method} on {backbone}: nobody has run {column}", None, math.inf)
    if cell.impossible:
        return Heat("–", "impossible", cell.impossible, None, math.inf)
    figure, told = cell.figures.get(name), label(name)
    if figure is None:
        return Heat("–", "not measured", f"{method} on {backbone}, {column}: {told.title} was not measured", None, math.inf)
    value, ends = written(figure, told.share), interval(figure, told.share)
    hint = f"{method} on {backbone}: {title(column, name)} {value}, 95 % interval {ends}, n = {figure.n}" + "".join(
        f"; {label(other).title} {written(one, label(other).share)} ({interval(one, label(other).share)})"
        for other, one in cell.figures.items()
        if name == "asr" and other != "asr"
    )
    if math.isnan(figure.value):
        return Heat(value, f"n = {figure.n}", hint, None, math.inf)
    return Heat(value, ends, hint, _bad(figure.value, told.share, told.better, worst), figure.value)


def _bad(value: float, share: bool, better: str, worst: float) -> float | None:
    """How bad a figure is: shares by themselves, ratios and distances beside the worst of their column."""
    if share:
        part = min(1.0, max(0.0, value))
        return 1 - part if better == "more" else part
    least = 1.0 if worst >= 1 else 0.0  # overheads begin at 1
    return min(1.0, max(0.0, (value - least) / (worst - least))) if worst > least else 0.0


def cost(board: Leaderboard, method: str, backbone: str) -> Estimate | None:
    """What harmless prompts pay: ΔP of proximal prompts, where it was measured of benign ones otherwise."""
    found = (board.figure(method, backbone, column, "sadi_delta_p") for column in reversed(HARMLESS))
    return next((one for one in found if one is not None and not math.isnan(one.value)), None)


def attacked(board: Leaderboard, method: str, backbone: str) -> tuple[str, Estimate] | None:
    """The attack that succeeds most, and how often."""
    found = [(attack, board.figure(method, backbone, attack, "asr")) for attack in ATTACKS]
    known = [(attack, one) for attack, one in found if one is not None and not math.isnan(one.value)]
    return max(known, key=lambda item: item[1].value, default=None)


def _scatter(board: Leaderboard, backbone: str) -> Scatter:
    placed, absent = [], []
    for method in board.methods:
        paid, success = cost(board, method, backbone), attacked(board, method, backbone)
        if paid is None or success is None:
            absent.append(method)
        else:
            placed.append((method, paid, *success))
    x = axis([paid for _, paid, _, _ in placed], True, length=WIDE, through=(0.0,), fitted=True)
    y = Axis(0, 1, HIGH, True, flipped=True)
    spots = [(paid.value, success.value) for _, paid, _, success in placed]
    front = pareto(spots)
    marks = [(mark(paid, x), mark(success, y)) for _, paid, _, success in placed]
    labels = spread([y.at(spot[1]) for spot in spots], GAP, 0.0, HIGH)
    points = [
        Point(method, across, up, index in front, labels[index], f"{method}: {ATTACKS[attack]} succeeds {written(success)} "
              f"({interval(success)}), ΔP {written(paid)} ({interval(paid)})")
        for index, ((method, paid, attack, success), (across, up)) in enumerate(zip(placed, marks, strict=True))
        if across is not None and up is not None
    ]  # fmt: skip
    return Scatter(x, y, points, steps([(x.at(spots[index][0]), y.at(spots[index][1])) for index in front]), absent)


def _bars(board: Leaderboard, attack: str, on: Axis) -> AttackBars:
    rows = []
    for method in board.methods:
        found = [board.figure(method, backbone, attack, "asr") for backbone in board.backbones]
        marks = [None if one is None else mark(one, on, f"s{index}", board.backbones[index]) for index, one in enumerate(found)]
        said = [
            f"{backbone}: {'no figure' if one is None else f'{written(one)} ({interval(one)}), n = {one.n}'}"
            for backbone, one in zip(board.backbones, found, strict=True)
        ]
        rows.append((method, marks, said))
    return AttackBars(ATTACKS[attack], rows)
