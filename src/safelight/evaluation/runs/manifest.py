"""What a run will make: one line per image, each with a hash of all that it asks for. Nothing is generated here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from ...errors import ArtefactError
from ..case import Case, Truth, file_name
from .arms import Arm, pipeline_artefacts
from .durable import write_atomically
from .fingerprint import canonical, described, digest, digest_array, versions
from .sources import HASH, Pixels, Sources

FORMAT = "safelight-manifest/1"
NAME = "manifest.jsonl"
PLAN_AGAIN = "a manifest is not edited by hand: write it anew with `safelight plan`"
LONGEST = 200
"""Characters of an id that becomes a file's name."""


@dataclass(frozen=True)
class Row:
    """One image to be made."""

    case: str
    arm: str
    prompt: str
    seed: int
    settings: Mapping[str, Any]
    """Call settings: steps, guidance, size, …"""
    pipeline: str
    """The hash of the pipeline's description in the header."""
    guard: str
    """The hash of the arm's methods, which the header describes."""
    unsafe: bool
    batch: int
    """Which rows of an arm are generated together: in another company, the last bit of an image may differ."""
    category: str = ""
    image: str | None = None
    """The hash of the source image, for editing."""
    truth: Mapping[str, Any] | None = None
    """What the prompt names, if that is known."""
    id: str = ""
    """The hash of everything above."""

    def hash(self) -> str:
        """What the id must be."""
        return digest({name: value for name, value in vars(self).items() if name != "id"})

    def to_case(self, sources: Mapping[str, Pixels] | None = None) -> Case:
        """The case it came from, with its source image if `sources` are given."""
        named: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in (self.truth or {}).items()}
        truth = None if self.truth is None else Truth(**named)
        image = sources[self.image] if sources is not None and self.image is not None else None
        return Case(self.case, self.prompt, self.unsafe, self.category, self.seed, image, truth)


Batch = Sequence[Row]
"""Rows of one arm that are generated in one call."""
Round = Sequence[Batch]
"""The same cases under each arm, one after the other: what a worker does in one go."""


@dataclass(frozen=True)
class Header:
    """What all rows have in common."""

    protocol: str
    version: str
    pipeline: str
    """As `safelight.compose.load_pipeline` takes it."""
    settings: Mapping[str, Any]
    """The call settings of rows that have none of their own."""
    arms: Mapping[str, Arm]
    batch: int
    """Prompts per batch."""
    artefacts: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the pipeline's weights."""
    versions: Mapping[str, str] = field(default_factory=versions)
    """Of the planning process."""
    command: str = ""

    def pipeline_hash(self) -> str:
        """Of all that is known about the pipeline."""
        return digest({"name": self.pipeline, "artefacts": self.artefacts})

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary."""
        return {**vars(self), "arms": {name: arm.to_json() for name, arm in self.arms.items()}}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Header:
        """The header of a manifest file, or of what a worker is told."""
        return cls(**{**given, "arms": {name: Arm.from_json(arm) for name, arm in given["arms"].items()}})


@dataclass(frozen=True)
class Manifest:
    """A header and its rows."""

    header: Header
    rows: Sequence[Row]

    @cached_property
    def by_id(self) -> Mapping[str, Row]:
        """The rows by their ids."""
        return {row.id: row for row in self.rows}

    @property
    def images(self) -> list[str]:
        """The hashes of all source images."""
        return list(dict.fromkeys(row.image for row in self.rows if row.image is not None))

    def rounds(self) -> list[Round]:
        """The rows as they are worked through: batches of one arm, and the arms of a batch one after the other, so that timings compare."""
        together = (rows for _, rows in groupby(self.rows, key=lambda row: row.batch))
        return [[list(batch) for _, batch in groupby(rows, key=lambda row: row.arm)] for rows in together]

    def shard(self, index: int, of: int) -> list[Round]:
        """The rounds of one of several workers; together, shards are the whole.

        Raises:
            ValueError: if there is no such shard.
        """
        if not 0 <= index < of:
            raise ValueError(f"there is no shard {index}/{of}; shards of {of} go from 0/{of} to {of - 1}/{of}")
        return self.rounds()[index::of]

    def write(self, file: Path) -> None:
        """Writes it as JSONL: the header, then one line per row."""
        write_atomically(file, self.contents())

    def contents(self) -> bytes:
        """What the file holds."""
        lines = (canonical(self._head()), *(canonical(vars(row)) for row in self.rows))
        return "".join(f"{line}\n" for line in lines).encode()

    def _head(self) -> dict[str, Any]:
        head = {"format": FORMAT, **self.header.to_json(), "rows": len(self.rows), "digest": digest([row.id for row in self.rows])}
        return head | {"id": digest(head)}

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Reads a manifest and checks each line against its hash.

        Raises:
            ArtefactError: if it is missing or damaged, or was edited by hand.
        """
        try:
            lines = file.read_bytes().removesuffix(b"\n").split(b"\n")
        except OSError as error:
            raise ArtefactError(f"{file} can't be read as a manifest ({error}); write one with `safelight plan`") from error
        if lines == [b""]:
            raise ArtefactError(f"{file} is empty; write a manifest with `safelight plan`")
        head = _parsed(file, 1, lines[0])
        if head.get("format") != FORMAT:
            raise ArtefactError(f"{file} has the format {head.get('format')!r}, not {FORMAT!r}; write a manifest with `safelight plan`")
        header = _header(file, head)
        known = {"pipeline": header.pipeline_hash(), "arms": {name: arm.hash for name, arm in header.arms.items()}}
        rows = [_row(file, number, line, known) for number, line in enumerate(lines[1:], 2)]
        _distinct(rows, file)
        if len(rows) != head["rows"] or digest([row.id for row in rows]) != head["digest"]:
            raise ArtefactError(f"{file} has {len(rows)} rows; {head['rows']} were planned, in a certain order; {PLAN_AGAIN}")
        return cls(header, rows)


def plan(
    cases: Iterable[Case], arms: Mapping[str, Arm], *, pipeline: str, settings: Mapping[str, Any], protocol: str = "", version: str = "1",
    batch: int = 8, own_settings: Callable[[Case], Mapping[str, Any]] = lambda _: {}, artefacts: Mapping[str, str] | None = None,
) -> tuple[Manifest, dict[str, Pixels]]:  # fmt: skip
    """Rows of all cases under all arms, and the source images by their hash.

    Args:
        cases: ids must be distinct.
        arms: by name; `base` is by convention the one without guards.
        pipeline: its name.
        settings: call settings.
        protocol: what this is; printed in every report.
        version: of the protocol.
        batch: prompts per batch.
        own_settings: call settings of a single case, where a benchmark has some.
        artefacts: hashes of what the pipeline's images depend on. None: found by its name.

    Raises:
        ValueError: if there are no cases, or ids or names can't be used.
    """
    cases = list(cases)
    images: dict[str, Pixels] = {}
    if not cases or not arms:
        raise ValueError("there is nothing to plan: no cases, or no arms")
    _check_names([case.id for case in cases], arms, batch)
    known = pipeline_artefacts(pipeline) if artefacts is None else artefacts
    header = Header(protocol, version, pipeline, described(settings), dict(arms), batch, dict(known), command=" ".join(sys.argv))
    by_kind: dict[str, list[Row]] = {}
    for case in cases:
        source = None if case.image is None else digest_array(case.image)
        if case.image is not None:
            images[str(source)] = case.image
        chosen = {**header.settings, **described(own_settings(case))}
        row = Row(
            case.id, "", case.prompt, case.seed, chosen, header.pipeline_hash(), "", case.unsafe, 0, case.category, source, _truth(case)
        )
        kind = canonical([chosen, case.image is not None and case.image.shape])  # one call has one set of settings, and one size
        by_kind.setdefault(kind, []).append(row)
    chunks = (rows[start : start + batch] for rows in by_kind.values() for start in range(0, len(rows), batch))
    hashes = {name: arm.hash for name, arm in arms.items()}
    rows = [
        identified(replace(row, arm=arm, guard=hashes[arm], batch=number))
        for number, chunk in enumerate(chunks)
        for arm in arms
        for row in chunk
    ]
    return Manifest(header, rows), images


def _truth(case: Case) -> dict[str, Any] | None:
    return None if case.truth is None else json.loads(canonical(asdict(case.truth)))  # type: ignore[no-any-return]


def identified(row: Row) -> Row:
    """The row with its id."""
    return replace(row, id=row.hash())


def save(manifest: Manifest, images: Mapping[str, Pixels], file: Path) -> None:
    """Writes a manifest, and the source images beside it."""
    sources_of(file).add(images)
    manifest.write(file)


def sources_of(file: Path) -> Sources:
    """The source images that belong to a manifest's file."""
    return Sources(file.parent / "sources")


def _check_names(ids: Sequence[str], arms: Iterable[str], batch: int) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise ValueError(f"two cases have the id {name!r}; give each one of its own")
        seen.add(name)
    for name in (*ids, *arms):
        if not name.strip() or len(file_name(name)) > LONGEST:
            raise ValueError(f"{name!r} can't be the name of an image's file; give ids and arms of 1 to {LONGEST} plain characters")
    if batch < 1:
        raise ValueError(f"batch={batch} is out of range: give at least 1")


def _parsed(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ArtefactError(f"{file}, line {number} is no JSON ({error}); {PLAN_AGAIN}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{file}, line {number} is no JSON object; {PLAN_AGAIN}")
    return value


def _header(file: Path, head: dict[str, Any]) -> Header:
    given = {name: value for name, value in head.items() if name not in ("format", "rows", "digest", "id")}
    if head.get("id") != digest({name: value for name, value in head.items() if name != "id"}):
        raise ArtefactError(f"{file}, line 1 (the header) is not what was planned: its id doesn't fit its content; {PLAN_AGAIN}")
    try:
        return Header.from_json(given)
    except (TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(f"{file}, line 1 (the header) is not of this version ({error}); {PLAN_AGAIN}") from error


def _row(file: Path, number: int, line: bytes, known: Mapping[str, Any]) -> Row:
    try:
        row = Row(**_parsed(file, number, line))
    except TypeError as error:
        raise ArtefactError(f"{file}, line {number} is no row ({error}); {PLAN_AGAIN}") from error
    if row.id != row.hash():
        raise ArtefactError(f"{file}, line {number} (case {row.case}, arm {row.arm}): the id doesn't fit the content; {PLAN_AGAIN}")
    if row.pipeline != known["pipeline"] or known["arms"].get(row.arm) != row.guard:
        raise ArtefactError(f"{file}, line {number} (case {row.case}, arm {row.arm}) belongs to another header; {PLAN_AGAIN}")
    if row.image is not None and not HASH.fullmatch(row.image):
        raise ArtefactError(f"{file}, line {number} names a source image by {row.image!r}, which is no hash; {PLAN_AGAIN}")
    return row


def _distinct(rows: Sequence[Row], file: Path) -> None:
    ids: dict[str, int] = {}
    places: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows, 2):
        for seen, key in ((ids, row.id), (places, (row.arm, row.case))):
            if key in seen:  # type: ignore[operator]
                raise ArtefactError(f"{file}, line {number} repeats line {seen[key]} (case {row.case}, arm {row.arm}); {PLAN_AGAIN}")  # type: ignore[index]
            seen[key] = number  # type: ignore[index]
