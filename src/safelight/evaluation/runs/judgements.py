"""What judges said, in `judgements/<judge>.jsonl`: who it was, then one line per image."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ...errors import ArtefactError
from ..case import Outcome
from ..judge import Judge, Judgement
from .durable import read_lines, write_atomically
from .fingerprint import described, digest

FOLDER = "judgements"
REMEDY = "remove that line, and the image will be judged again"


@dataclass(frozen=True)
class Judged:
    """One image, as one judge sees it; with an error instead, if it could not be judged."""

    id: str
    """The manifest's row."""
    image: str
    """The hash of the image (`sha256` of its outcome)."""
    case: str
    arm: str
    judgement: Judgement | None = None
    error: str | None = None

    @classmethod
    def of(cls, outcome: Outcome, found: Judgement | str) -> Judged:
        """What came of an outcome: a judgement, or why there is none."""
        failed = isinstance(found, str)
        place = (outcome.id, outcome.sha256, outcome.case, outcome.arm)
        return cls(*place, None, str(found)) if failed else cls(*place, found)  # type: ignore[arg-type]

    def to_line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


def description(judge: Judge) -> dict[str, Any]:
    """All that a judgement depends on; another description makes all judgements anew. Fields of this machine only (keys) are not part of it."""
    chosen: list[str] = [f.name for f in fields(judge) if f.init and "local" not in f.metadata] if is_dataclass(judge) else []
    return judge.describe() | {"settings": {name: described(getattr(judge, name)) for name in chosen}}


def checked(judgement: Judgement) -> Judgement:
    """A judgement that can be stored.

    Raises:
        ValueError: if its numbers are not numbers.
    """
    if not all(math.isfinite(value) for value in (judgement.score, *judgement.labels.values())):
        raise ValueError("the judge's score is not a number")
    return Judgement(bool(judgement.unsafe), float(judgement.score), {name: float(value) for name, value in judgement.labels.items()})


class Judgements:
    """The file of one judge. If the judge's version or settings change, its judgements are set aside, and found again if it changes back."""

    def __init__(self, run: Path, judge: Judge) -> None:
        self.folder, self.judge = run / FOLDER, judge
        self.file = self.folder / f"{judge.name}.jsonl"
        self.head = described(description(judge))

    def resume(self, outcomes: Iterable[Outcome]) -> dict[str, Judged]:
        """The judgements that still hold: of this judge as it is now, of these very images. Failed ones are tried again."""
        self._set_aside()
        known = {outcome.id: outcome.sha256 for outcome in outcomes}
        judged = read_judgements(self.file)
        kept = {name: one for name, one in judged.items() if one.error is None and known.get(name) == one.image}
        head = json.dumps({"judge": self.head}) + "\n"
        write_atomically(self.file, (head + "".join(one.to_line() for one in kept.values())).encode())
        return kept

    def add(self, judged: Sequence[Judged]) -> None:
        """Appends lines."""
        with self.file.open("a") as file:
            file.writelines(one.to_line() for one in judged)
            file.flush()
            os.fsync(file.fileno())

    def _set_aside(self) -> None:
        lines = read_lines(self.file, REMEDY)[:1]
        if lines and lines[0].get("judge") != self.head:
            self.file.replace(self._aside(lines[0].get("judge")))
        if not self.file.is_file() and self._aside(self.head).is_file():
            self._aside(self.head).replace(self.file)

    def _aside(self, head: Any) -> Path:
        return self.folder / f"{self.judge.name}@{digest(head)[:8]}.jsonl"


def read_judgements(file: Path) -> dict[str, Judged]:
    """What a file holds, by row: judgements and failures."""
    lines = read_lines(file, REMEDY)[1:]
    return {judged.id: judged for judged in (_read(file, number, line) for number, line in enumerate(lines, 2))}


def _read(file: Path, number: int, line: dict[str, Any]) -> Judged:
    try:
        judgement = line.pop("judgement")
        return Judged(**line, judgement=None if judgement is None else Judgement(**judgement))
    except (TypeError, KeyError) as error:
        raise ArtefactError(f"{file}, line {number} is damaged ({error}); {REMEDY}") from error
