"""The second pass: any number of judges look at stored images. Nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compose import parse_settings
from ...errors import ArtefactError
from ...registry import Registry
from ...schema import field_of
from ..case import Outcome
from ..judge import Judge, Judgement, Picture
from .durable import only_one
from .fingerprint import digest_array
from .judgements import FOLDER, Judged, Judgements, checked
from .manifest import NAME, Manifest
from .store import read_outcomes, read_picture

JUDGES: Registry[Judge] = Registry("safelight.evaluation.judges", Judge)
Progress = Callable[[str, int, int], None]


def build_judges(names: Sequence[str], settings: Sequence[str] = ()) -> list[Judge]:
    """Judges by name.

    Args:
        names: as in `safelight list`.
        settings: `judge.field=value` each.

    Raises:
        ValueError: for an unknown judge, field or value, or a judge named twice.
    """
    changes = parse_settings(settings)
    if len(set(names)) < len(names) or not names:
        raise ValueError("name at least one judge, and each of them once")
    judges = []
    for name in names:
        cls: Any = JUDGES[name]
        own = {key.split(".", 1)[1]: changes.pop(key) for key in list(changes) if key.startswith(f"{name}.")}
        judges.append(cls(**{field: field_of(cls, field).parse(text) for field, text in own.items()}))
    if changes:
        raise ValueError(f"--set {min(changes)} fits none of the judges {', '.join(names)}; write judge.field=value")
    return judges


def judge_run(
    folder: Path, judges: Sequence[Judge], batch: int = 16, progress: Progress = lambda *_: None
) -> dict[str, dict[str, Judged]]:  # fmt: skip
    """Judge -> row -> what it says of that row's image. What was judged before, by the same judge with the same settings, is kept.

    An image that is gone or damaged, or that a judge fails on, is kept as failed, with the error, and the run goes on.

    Raises:
        ArtefactError: if `folder` is no run, is being judged already, or if a judge lacks a package, weights or access.
    """
    manifest, outcomes = Manifest.read(folder / NAME), read_outcomes(folder)
    outcomes = [outcome for outcome in outcomes if outcome.id in manifest.by_id]
    with only_one(folder / FOLDER):
        return {judge.name: _Pass(folder, judge, batch).run(outcomes, progress) for judge in judges}


@dataclass
class _Pass:
    """One judge over one run."""

    folder: Path
    judge: Judge
    batch: int

    def run(self, outcomes: Sequence[Outcome], progress: Progress) -> dict[str, Judged]:
        kept = Judgements(self.folder, self.judge)
        found = kept.resume(outcomes)
        known = {outcome.pixels: found[outcome.id].judgement for outcome in outcomes if outcome.pixels and outcome.id in found}
        todo = [outcome for outcome in outcomes if outcome.id not in found]
        progress(self.judge.name, len(found), len(outcomes))
        for start in range(0, len(todo), self.batch):
            judged = self._look(todo[start : start + self.batch], known)
            kept.add(judged)
            found |= {one.id: one for one in judged}
            progress(self.judge.name, len(found), len(outcomes))
        return found

    def _look(self, outcomes: Sequence[Outcome], known: dict[str, Judgement | None]) -> list[Judged]:
        """One line per image; equal pictures are judged once."""
        read = {outcome.id: self._read(outcome) for outcome in outcomes}
        hashes = {name: digest_array(picture) for name, picture in read.items() if not isinstance(picture, str)}
        new = {hashes[name]: picture for name, picture in read.items() if name in hashes and hashes[name] not in known}
        said = dict(zip(new, self._judge(list(new.values())), strict=True))  # type: ignore[arg-type]
        known |= {name: found for name, found in said.items() if isinstance(found, Judgement)}
        results: dict[str, Any] = {name: said.get(hashed) or known[hashed] for name, hashed in hashes.items()}
        return [Judged.of(outcome, results.get(outcome.id, read[outcome.id])) for outcome in outcomes]

    def _read(self, outcome: Outcome) -> Picture | str:
        try:
            picture = read_picture(self.folder, outcome)
        except ArtefactError as error:
            return str(error)
        if outcome.pixels and digest_array(picture) != outcome.pixels:
            return f"{outcome.image} is not the image that was made: its hash is another one; remove its line to make it again"
        return picture

    def _judge(self, pictures: Sequence[Picture]) -> list[Judgement | str]:
        """A judgement per picture, or an error. A batch that fails is judged picture by picture, to find the culprit."""
        if not pictures:
            return []
        try:
            found = self.judge(pictures)
            if len(found) != len(pictures):
                raise ValueError(f"{self.judge.name} gave {len(found)} judgements for {len(pictures)} pictures")
            return [checked(one) for one in found]
        except ArtefactError:  # the judge can't work at all
            raise
        except Exception as error:
            if len(pictures) == 1:
                return [f"{type(error).__name__}: {error}"[:500]]
            return [one for picture in pictures for one in self._judge([picture])]
