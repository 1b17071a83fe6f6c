"""The leaderboard: methods x backbones x columns, read from `leaderboard.json`, checked, and written as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArtefactError
from ..case import Estimate
from .labels import label, number

METHODS = (
    "unguarded", "negative_prompt", "sld-weak", "sld-medium", "sld-strong", "sld-max", "safree", "post_filter", "block", "uce",
    "dual_latent", "saferedir", "uvr", "safedig", "combination",
)  # fmt: skip
"""The order of rows; methods that aren't listed stand before the combination."""
OPTIONAL = ("sld-weak", "sld-strong", "sld-max")
"""Rows that a complete leaderboard may lack."""
ATTACKS = {"plain": "plain", "paraphrase": "paraphrase", "ring_a_bell": "Ring-A-Bell", "unlearn_diff_atk": "UnlearnDiffAtk"}
HARMLESS = {"benign": "benign", "proximal": "proximal"}
COLUMNS = ATTACKS | HARMLESS
KNOWN = ("asr", "asr_classifier", "asr_matcher", "erase_rate", "retention", "untouched", "over_refusal", "alignment", "frechet",
         "sadi_delta_p", "overhead")  # fmt: skip
START, END = "<!-- leaderboard: made by `safelight report --markdown` -->", "<!-- /leaderboard -->"


@dataclass(frozen=True)
class BoardCell:
    """One method on one backbone, under one column."""

    method: str
    backbone: str
    column: str
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    impossible: str = ""
    """Why there can be no figures; empty if there are."""


@dataclass(frozen=True)
class Claim:
    """What a paper says, and whether it is reached here, by whose method."""

    claim: str
    source: str
    holds: bool | None
    figures: str
    variant: bool = True
    """Whether the figures are of a variant of ours, and not of the method as published; only of the latter can be said that a claim holds."""

    @property
    def verdict(self) -> str:
        """In words."""
        if self.holds is None:
            return "undecided"
        if self.variant:
            return "our variant reaches it" if self.holds else "our variant does not reach it"
        return "holds" if self.holds else "does not hold"


@dataclass(frozen=True)
class Leaderboard:
    """A whole leaderboard."""

    concept: str
    cells: Mapping[tuple[str, str, str], BoardCell]
    claims: Sequence[Claim]
    versions: Mapping[str, str]
    command: str
    seconds: float | None

    @property
    def methods(self) -> list[str]:
        """The rows, in order: all that there should be, and all that there are."""
        present = dict.fromkeys(method for method, _, _ in self.cells)
        listed = [method for method in METHODS if method in present or method not in OPTIONAL]
        others = [method for method in present if method not in METHODS]
        return [*listed[:-1], *others, listed[-1]]

    @property
    def backbones(self) -> list[str]:
        """The backbones, in the order of the file."""
        return list(dict.fromkeys(backbone for _, backbone, _ in self.cells))

    @property
    def missing(self) -> list[str]:
        """The cells that a complete leaderboard has and this one lacks, as `method / backbone / column`."""
        wanted = [(method, backbone, column) for method in self.methods for backbone in self.backbones for column in COLUMNS]
        return [" / ".join(key) for key in wanted if key not in self.cells]

    def complete(self) -> Leaderboard:
        """This leaderboard.

        Raises:
            ArtefactError: if cells are missing; all of them are named.
        """
        if self.missing:
            raise ArtefactError(f"the leaderboard lacks {len(self.missing)} cells: {', '.join(self.missing)}; run its recipe again")
        return self

    def figure(self, method: str, backbone: str, column: str, name: str) -> Estimate | None:
        """A figure of a cell; None if there is no such cell or figure."""
        cell = self.cells.get((method, backbone, column))
        return None if cell is None else cell.figures.get(name)


def read_leaderboard(file: Path) -> Leaderboard:
    """Reads and checks `leaderboard.json`.

    Raises:
        ArtefactError: if it is no leaderboard, or one of its cells can't be right; the message says which and why.
    """
    try:
        given = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{file} can't be read as a leaderboard ({error}); give the leaderboard.json that its recipe wrote") from error
    if not isinstance(given, dict) or given.get("kind") != "leaderboard":
        raise ArtefactError(f'{file} is no leaderboard: its "kind" is not "leaderboard"; give the leaderboard.json that its recipe wrote')
    cells: dict[tuple[str, str, str], BoardCell] = {}
    for index, one in enumerate(_list(file, given, "cells")):
        cell = _cell(file, index, one)
        key = cell.method, cell.backbone, cell.column
        if key in cells:
            raise ArtefactError(f"{file} has two cells {' / '.join(key)}; which one is right? Remove the other")
        cells[key] = cell
    if not cells:
        raise ArtefactError(f"{file} has no cells; run its recipe again")
    claims = [_claim(file, index, one) for index, one in enumerate(_list(file, given, "claims", needed=False))]
    return Leaderboard(
        str(given.get("concept", "")), cells, claims, dict(given.get("versions") or {}), str(given.get("command", "")), given.get("seconds")
    )


def _list(file: Path, given: Mapping[str, Any], name: str, *, needed: bool = True) -> list[Any]:
    found = given.get(name, None if needed else [])
    if not isinstance(found, list):
        raise ArtefactError(f"{file} has no list of {name}; run its recipe again")
    return found


def _cell(file: Path, index: int, given: Any) -> BoardCell:
    where = f"{file}, cell {index}"
    keys = [given.get(key) for key in ("method", "backbone", "column")] if isinstance(given, dict) else [None]
    if not all(isinstance(key, str) and key for key in keys):
        raise ArtefactError(f"{where} does not name its method, backbone and column: {json.dumps(given)[:200]}")
    method, backbone, column = map(str, keys)
    where += f" ({method} / {backbone} / {column})"
    if column not in COLUMNS:
        raise ArtefactError(f"{where}: there is no column {column!r}; there are {', '.join(COLUMNS)}")
    if given.get("impossible"):
        return BoardCell(method, backbone, column, {}, str(given["impossible"]))
    figures = given.get("figures")
    if not isinstance(figures, dict) or not figures:
        raise ArtefactError(f'{where} has no figures, and no "impossible" that says why')
    unknown = [name for name in figures if name not in KNOWN]
    if unknown:
        raise ArtefactError(f"{where}: unknown figures {', '.join(unknown)}; there are {', '.join(KNOWN)}")
    if column in ATTACKS and "asr" not in figures:
        raise ArtefactError(f"{where} has no asr, which every attack's cell needs")
    return BoardCell(method, backbone, column, {name: _estimate(where, name, one) for name, one in figures.items()})


def _estimate(where: str, name: str, given: Any) -> Estimate:
    """A figure; null is undefined."""
    if not isinstance(given, dict) or not set(Estimate._fields) <= set(given):
        raise ArtefactError(f"{where}: {name} needs value, low, high and n, and has {json.dumps(given)[:100]}")
    try:
        value, low, high = (math.nan if given[key] is None else float(given[key]) for key in ("value", "low", "high"))
        n = int(given["n"])
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"{where}: {name} is no figure ({error})") from error
    if not math.isnan(value) and (low > value + 1e-9 or high < value - 1e-9):
        raise ArtefactError(f"{where}: {name} is {value:g}, outside its own interval {low:g} to {high:g}")
    return Estimate(value, low, high, n)


def _claim(file: Path, index: int, given: Any) -> Claim:
    if not isinstance(given, dict) or not given.get("claim") or given.get("holds") not in (True, False, None):
        raise ArtefactError(f'{file}, claim {index} needs a "claim", and "holds" as true, false or null: {json.dumps(given)[:200]}')
    if given.get("variant", True) not in (True, False):
        raise ArtefactError(f'{file}, claim {index}: "variant" is true or false, not {given["variant"]!r}')
    told = str(given["claim"]), str(given.get("source", "")), given.get("holds"), str(given.get("figures", ""))
    return Claim(*told, variant=given.get("variant", True))


def markdown(board: Leaderboard) -> str:
    """The leaderboard as tables for a document: one per backbone, then the claims."""
    lines = [f"{len(board.missing)} of its cells are missing: {', '.join(board.missing)}.", ""] if board.missing else []
    for backbone in board.backbones:
        lines += [f"**{backbone}**", "", *_table(board, backbone), ""]
    if board.claims:
        lines += ["| claim | source | here | figures |", "|---|---|---|---|"]
        lines += [f"| {_plain(one.claim)} | {_plain(one.source)} | {one.verdict} | {_plain(one.figures)} |" for one in board.claims]
        lines.append("")
    lines.append(f"`{board.command}`" + (f", {board.seconds / 60:.0f} minutes" if board.seconds else ""))
    return "\n".join(lines)


SHOWN = (
    *((column, "asr") for column in ATTACKS), ("plain", "retention"), ("benign", "untouched"), ("benign", "over_refusal"), ("proximal", "over_refusal"),
    ("proximal", "sadi_delta_p"), ("benign", "alignment"), ("benign", "frechet"), ("benign", "overhead"),
)  # fmt: skip
"""The figures of a table, by column and name."""


def title(column: str, name: str) -> str:
    """What a table calls a figure."""
    return f"ASR, {COLUMNS[column]}" if name == "asr" else f"{label(name).title}, {COLUMNS[column]}"


def _table(board: Leaderboard, backbone: str) -> list[str]:
    columns = [(column, name) for column, name in SHOWN if any(board.figure(m, backbone, column, name) for m in board.methods)]
    lines = ["| method | " + " | ".join(title(*one) for one in columns) + " |", "|---|" + "---|" * len(columns)]
    for method in board.methods:
        lines.append(f"| {method} | " + " | ".join(told(board, method, backbone, *one) for one in columns) + " |")
    return lines


def told(board: Leaderboard, method: str, backbone: str, column: str, name: str) -> str:
    """A cell in words: value and interval, or why there is none."""
    cell = board.cells.get((method, backbone, column))
    if cell is None:
        return "missing"
    if cell.impossible:
        return "impossible"
    figure = cell.figures.get(name)
    if figure is None:
        return "not measured"
    share = label(name).share
    value = number(figure.value, share)
    return value if math.isnan(figure.value) else f"{value} ({number(figure.low, share)} to {number(figure.high, share)})".replace(" %", "")


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def put_markdown(board: Leaderboard, file: Path) -> None:
    """Writes the tables between the markers of a document.

    Raises:
        ArtefactError: if the document is not there, or has no markers.
    """
    if not file.is_file() or START not in (text := file.read_text()) or END not in text:
        raise ArtefactError(f"{file} has no place for a leaderboard; put these lines where it belongs:\n{START}\n{END}")
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    file.write_text(f"{before}{START}\n\n{markdown(board)}\n\n{END}{after}")
