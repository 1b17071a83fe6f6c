"""A list of prompts, read from the user's own copy: nothing is shipped, nothing is hosted elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...tables import Row, Table, read_table
from ..case import Case
from .hub import fetch, is_address
from .minors import sexualises_minor

LONGEST = 2_000
"""Characters. The longest prompt of the public lists has 1,093; text encoders read a few hundred."""
LARGEST_SEED = 2**63 - 1
LARGEST_GUIDANCE = 1_000
"""I2P has rows of up to 255."""
LARGEST_SIDE = 8_192
"""Pixels."""
SAFE_NAME = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)
"""Ids become file names."""


@dataclass(frozen=True)
class Benchmark:
    """The cases of one file, and what was left out of it."""

    name: str
    source: str
    """The file's name, or the Hub address."""
    kept: tuple[Case, ...]
    rows: int
    """Rows of the file, or of the part of it that the list means."""
    minors: int
    """Rows that were dropped because they may sexualise a minor."""
    blank: int = 0
    """Rows without a prompt that the public file is known to have."""
    version: str = "1"

    def cases(self, count: int | None = None) -> Sequence[Case]:
        """The first `count` cases; all of them without a count.

        Raises:
            ValueError: if there are fewer.
        """
        if count is None:
            return self.kept
        if not 1 <= count <= len(self.kept):
            raise ValueError(f"{self.name} has {len(self.kept):,} cases ({self.summary}); ask for 1 to {len(self.kept):,}, not {count:,}")
        return self.kept[:count]

    @property
    def sha256(self) -> str:
        """The hash of the list: ids, prompts, seeds, guidance, sizes, categories and order."""
        return hash_of(self.kept)

    @property
    def summary(self) -> str:
        """What was read and dropped, in words."""
        blank = f", {self.blank:,} blank" if self.blank else ""
        return f"{self.rows:,} rows, {self.minors:,} dropped because they may sexualise a minor{blank}"


def hash_of(cases: Sequence[Case]) -> str:
    """The SHA-256 of a list of cases, 64 hexadecimal digits. A source picture is not part of it, the prompt that names it is."""
    digest = hashlib.sha256()
    for case in cases:
        row = [case.id, case.prompt, case.unsafe, case.category, case.seed, case.guidance, case.size]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A public list: what its columns are called, where to get it, and under which licence. One per file in `benchmarks/`."""

    name: str
    title: str
    paper: str
    """Authors, year, url."""
    licence: str
    access: str
    """How to get the file: what is said when it is missing."""
    prompt: tuple[str, ...] = ("prompt",)
    """Names of the column with the prompt, the first that is present; so for all columns."""
    identity: tuple[str, ...] = ()
    """A row's id; its number, counted from 0, where there is no such column."""
    seed: tuple[str, ...] = ()
    guidance: tuple[str, ...] = ()
    height: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    default_category: str = ""
    context: tuple[str, ...] = ()
    """Further columns with text, such as what an adversarial prompt aims at: read for minors only."""
    group: tuple[str, ...] = ("class",)
    """Who is shown."""
    unsafe: bool | tuple[str, ...] = True
    """Whether its prompts are unsafe, or the column that says so."""
    sexual: bool = False
    """Whether the list is sexual as a whole, so that any mention of a minor drops a row."""
    first_seed: int = 1000
    """The seed of row 0 where the file gives none."""
    seed_step: int = 1
    """By how much the next row's seed is larger; 0 for one seed for all."""
    numbering: str = "{:05d}"
    """How ids are made of row numbers."""
    as_id: Callable[[str], str] = str.strip
    known_blank: Callable[[Case], bool] = lambda case: False
    """Whether a row is known to have no prompt in the public file; others without one are refused."""
    undecodable: Literal["strict", "replace"] = "strict"
    read: Callable[..., Table] = read_table
    keep: Callable[[str, Row], bool] = lambda identity, row: True
    """Whether a row, by its id and values, belongs to the list."""
    labels: Callable[[Row], Sequence[str]] = lambda row: ()
    """What makes a row sexual, besides its category."""

    def load(self, source: str | Path | None, *, encoding: str = "utf-8") -> Benchmark:
        """Reads the user's copy: a path, or `hub:owner/name/file` for a file of a Hub data set.

        Raises:
            ValueError: if the file is missing, or anything in it is; the message names file, row and remedy, never a prompt.
        """
        if source is None:
            raise ValueError(
                f"{self.title} does not come with Safelight; give your copy as the source. {self.access} Licence: {self.licence}"
            )
        path = fetch(str(source), self) if is_address(str(source)) else Path(source)
        if not path.exists():
            raise ValueError(f"there is no file {path}. {self.access} Licence of {self.title}: {self.licence}")
        table = self.read(path, encoding=encoding, errors=self.undecodable)
        return self.collect(replace(table, name=str(source) if is_address(str(source)) else path.name))

    def collect(self, table: Table) -> Benchmark:
        """The cases of a table."""
        self._column(table, self.prompt, needed=True)
        named = self._named(table)
        cases, minors, blank = [], 0, 0
        for index, (identity, row) in named.items():
            case = self._case(table, row, index, identity)
            if self.known_blank(case):
                blank += 1
            elif self._sexualises_minor(table, row, case):
                minors += 1
            elif case.prompt.strip():
                cases.append(case)
            else:
                raise ValueError(f"{table.where(index)} has an empty prompt; remove the row, or complete it")
        if not cases:
            raise ValueError(
                f"all {len(named):,} rows of {table.name} were dropped ({minors:,} may sexualise a minor, {blank:,} are blank)"
            )
        return Benchmark(self.name, table.name, tuple(cases), len(named), minors, blank)

    def _named(self, table: Table) -> dict[int, tuple[str, Row]]:
        """The rows that belong to the list, by number, with their ids."""
        seen: dict[str, int] = {}
        named = {}
        for index, row in enumerate(table.rows):
            identity = self._identity(table, row, index)
            if identity in seen:
                raise ValueError(f"{table.where(index)} has the id {identity!r} of row {seen[identity] + 1:,}; ids must differ")
            seen[identity] = index
            if self.keep(identity, row):
                named[index] = identity, row
        if not named:
            raise ValueError(f"{table.name} has {len(table.rows):,} rows, and none of them belongs to {self.name}; is it the right file?")
        return named

    def _sexualises_minor(self, table: Table, row: Row, case: Case) -> bool:
        text = "\n".join((case.prompt, *(row[column] for column in self.context if column in table.columns)))
        labels = (case.category, *self.labels(row))
        return sexualises_minor(text, labels, sexual=self.sexual, group=self._text(table, row, self.group) if case.unsafe else "")

    def _case(self, table: Table, row: Row, index: int, identity: str) -> Case:
        where = table.where(index)
        prompt = self._text(table, row, self.prompt)
        if len(prompt) > LONGEST:
            raise ValueError(
                f"{where} has a prompt of {len(prompt):,} characters; text encoders read a few hundred, so at most {LONGEST:,}"
            )
        seed = self._whole(table, row, self.seed, where, LARGEST_SEED)
        height, width = (self._whole(table, row, column, where, LARGEST_SIDE) for column in (self.height, self.width))
        if (height is None) != (width is None) or 0 in (height, width):
            raise ValueError(f"{where} has the height {height} and width {width}; give both, in pixels, or neither")
        size = None if height is None or width is None else (height, width)
        return Case(
            identity, prompt, self._unsafe(table, row, where), self._text(table, row, self.category) or self.default_category,
            self.first_seed + self.seed_step * index if seed is None else seed, guidance=self._guidance(table, row, where), size=size,
        )  # fmt: skip

    def _identity(self, table: Table, row: Row, index: int) -> str:
        identity = self.as_id(self._text(table, row, self.identity)) or self.numbering.format(index)
        if not SAFE_NAME.fullmatch(identity):
            raise ValueError(
                f"{table.where(index)} has an id that can't be a file's name; use at most 100 letters, digits, '-', '_' and '.'"
            )
        return identity

    def _unsafe(self, table: Table, row: Row, where: str) -> bool:
        if isinstance(self.unsafe, bool):
            return self.unsafe
        text = self._text(table, row, self.unsafe).strip().casefold()
        if text not in (known := {"": True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}):
            raise ValueError(f"{where}: {self.unsafe[0]} must be true or false")
        return known[text]

    def _guidance(self, table: Table, row: Row, where: str) -> float | None:
        text = self._text(table, row, self.guidance).strip()
        try:
            value = float(text) if text else None
        except ValueError:
            value = float("nan")
        if value is not None and not 0 <= value <= LARGEST_GUIDANCE:
            raise ValueError(f"{where} has a guidance scale that is not a number from 0 to {LARGEST_GUIDANCE:,}")
        return value

    def _whole(self, table: Table, row: Row, names: tuple[str, ...], where: str, largest: int) -> int | None:
        """A whole number; pandas writes whole numbers of columns with gaps as 12.0."""
        text = self._text(table, row, names).strip()
        if not text:
            return None
        whole = re.fullmatch(r"(\d{1,19})(?:\.0)?", text, re.ASCII)
        if not whole or int(whole[1]) > largest:
            column = self._column(table, names)
            shown = repr(text) if re.fullmatch(r"[\w.+-]{1,30}", text) else "a text"  # never a prompt, should columns be shifted
            raise ValueError(f"{where} has {shown} in the column {column!r}; it must be a whole number from 0 to {largest:,}")
        return int(whole[1])

    def _text(self, table: Table, row: Row, names: tuple[str, ...]) -> str:
        column = self._column(table, names)
        return "" if column is None else row[column]

    def _column(self, table: Table, names: tuple[str, ...], needed: bool = False) -> str | None:
        return table.column(names, self.title) if needed else next((name for name in names if name in table.columns), None)

    def describe(self) -> Mapping[str, Any]:
        """What is said about the list in a report or on the command line."""
        return {"list": self.title, "paper": self.paper, "licence": self.licence, "access": self.access}
