"""Shards, and the folders of several machines, become one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ArtefactError
from ..case import Outcome
from .durable import LOCK, only_one, write_atomically
from .manifest import NAME, Manifest, Row, sources_of
from .store import OUTCOMES, check_outcomes, claim, line_of


@dataclass(frozen=True)
class Merged:
    """What came together."""

    rows: int
    """How many rows have their image."""
    missing: Sequence[Row]
    """Those that have none yet."""


def merge(out: Path, folders: Sequence[Path] = ()) -> Merged:
    """Writes one `outcomes.jsonl`, in the manifest's order, of all shards in `out` and in `folders`, whose images are copied.

    Raises:
        ArtefactError: if a run is at work in `out`, folders are of different manifests, one row has two different images, or an image is gone.
    """
    places = list(dict.fromkeys([out, *folders]))
    for place in folders or [out]:
        if not (place / NAME).is_file():
            Manifest.read(place / NAME)  # says what is wrong, before a folder is made
    with only_one(out):
        manifest = _manifest(out, folders)
        found: dict[str, tuple[Path, Outcome]] = {}
        for place in places:
            _add(found, place, manifest)
        for place, outcome in found.values():
            _bring(place, out, outcome)
        for place in folders:
            sources_of(out / NAME).copy(manifest.images, sources_of(place / NAME))
        rows = [row for row in manifest.rows if row.id in found]
        write_atomically(out / OUTCOMES, "".join(line_of(found[row.id][1]) for row in rows).encode())
        for file in (*out.glob("outcomes-*.jsonl"), *out.glob(f"{LOCK}-*")):
            file.unlink()  # all of their lines are in outcomes.jsonl now
    return Merged(len(rows), [row for row in manifest.rows if row.id not in found])


def _manifest(out: Path, folders: Sequence[Path]) -> Manifest:
    places = [place for place in (out, *folders) if place != out or not folders or (out / NAME).is_file()]
    first, *others = [Manifest.read(place / NAME) for place in places]
    for place, other in zip(places[1:], others, strict=True):
        if other.by_id.keys() != first.by_id.keys():
            raise ArtefactError(f"{place} is a run of another manifest than {places[0]}; merge only runs of one manifest")
    if places[0] != out:
        claim(out, first)
    return first


def _add(found: dict[str, tuple[Path, Outcome]], place: Path, manifest: Manifest) -> None:
    for outcome in check_outcomes(place, manifest):
        first, known = found.setdefault(outcome.id, (place, outcome))
        if known.sha256 != outcome.sha256:
            raise ArtefactError(
                f"{first} and {place} have different images of arm {outcome.arm}, case {outcome.case} (hashes {known.sha256} and "
                f"{outcome.sha256}); leave one of the folders out, or remove the line of one"
            )


def _bring(place: Path, out: Path, outcome: Outcome) -> None:
    image = f"{place}/{outcome.image}"
    if not os.path.isfile(image):  # many of them: Path is slow
        raise ArtefactError(f"{image} is missing, though it has a line in {place}; put it back, or run {place} again with --remake")
    if place != out:
        write_atomically(out / outcome.image, Path(image).read_bytes())
