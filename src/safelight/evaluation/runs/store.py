"""A run's folder: images, and a line of JSON beside each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ArtefactError
from ..case import Outcome, image_of
from .durable import only_one, read_lines, write_atomically
from .manifest import NAME, Batch, Manifest, sources_of
from .sources import Pixels, Sources, from_png

OUTCOMES = "outcomes.jsonl"
REMAKE = "remove that line, and the run will make its image again"
Shard = tuple[int, int] | None
"""Which of how many; None: the whole."""


@dataclass(frozen=True)
class Made:
    """An image that was just made, and its line."""

    outcome: Outcome
    png: bytes = field(repr=False)


class Store:
    """Where one worker's images go. Use `opened`."""

    def __init__(self, folder: Path, manifest: Manifest, shard: Shard) -> None:
        self.folder, self.manifest = folder, manifest
        self.shard, self.file = shard, folder / outcomes_name(shard)
        self.done: dict[str, Outcome] = {}

    @property
    def sources(self) -> Sources:
        """The source images of editing."""
        return sources_of(self.folder / NAME)

    def keep(self, made: Sequence[Made]) -> None:
        """Writes images, then their lines; what is there already stays as it is."""
        new = [one for one in made if one.outcome.id not in self.done]
        for one in new:
            write_atomically(self.folder / one.outcome.image, one.png)
        with self.file.open("a") as file:
            file.writelines(line_of(one.outcome) for one in new)
            file.flush()
            os.fsync(file.fileno())
        self.done |= {one.outcome.id: one.outcome for one in new}

    def resume(self, remake: bool) -> None:
        """Looks what is finished: a line *and* its image. A line without its image is refused, or (`remake`) made again."""
        _repair(self.file)
        if self.shard is None:
            for partial in (self.folder / "images").rglob("*.partial"):  # what a crash left behind
                partial.unlink()
        outcomes = check_outcomes(self.folder, self.manifest)
        gone = [outcome for outcome in outcomes if not os.path.isfile(f"{self.folder}/{outcome.image}")]  # many of them: Path is slow
        if gone and not remake:
            raise ArtefactError(
                f"{self.folder / gone[0].image} can't be read: it is missing, as are {len(gone) - 1} other images that have a line in "
                f"{OUTCOMES}; put it back, or make it again with --remake (or by removing its line)"
            )
        missing = {outcome.id for outcome in gone}
        if missing:  # other shards' files are theirs
            _forget(self.folder.glob("outcomes*.jsonl") if self.shard is None else [self.file], missing)
        self.done = {outcome.id: outcome for outcome in outcomes if outcome.id not in missing}

    def unfinished(self, batches: Iterable[Batch]) -> list[Batch]:
        """Those of which a row is still to be made."""
        return [batch for batch in batches if any(row.id not in self.done for row in batch)]


@contextmanager
def opened(folder: Path, manifest: Manifest, sources: Sources | None = None, shard: Shard = None, remake: bool = False) -> Iterator[Store]:
    """A run's folder, for this process alone (or this shard of it), with its manifest and source images.

    Raises:
        ArtefactError: if another run is at work there, or it holds something else, or is damaged.
    """
    with only_one(folder, shard):
        claim(folder, manifest)
        store = Store(folder, manifest, shard)
        if sources is not None:
            store.sources.copy(manifest.images, sources)
        store.resume(remake)
        yield store


def claim(folder: Path, manifest: Manifest) -> None:
    """Makes a folder this manifest's. One that was planned with fewer rows may grow.

    Raises:
        ArtefactError: if it holds rows that this manifest doesn't have.
    """
    file = folder / NAME
    if file.is_file():
        if file.read_bytes() == manifest.contents():
            return
        there = Manifest.read(file)
        if list(there.by_id) == list(manifest.by_id):
            return  # planned on another day
        if not there.by_id.keys() <= manifest.by_id.keys():
            raise ArtefactError(f"{folder} holds a run with other settings (see {file}); choose another folder, or remove this one")
    elif next(folder.glob("outcomes*.jsonl"), None) is not None:
        raise ArtefactError(f"{folder} holds images but no {NAME}, so nobody knows what they are; choose another folder")
    manifest.write(file)


def check_outcomes(folder: Path, manifest: Manifest) -> list[Outcome]:
    """A run's outcomes so far, all of which this manifest asks for.

    Raises:
        ArtefactError: if there is another one, or a damaged line.
    """
    outcomes = read_outcomes(folder)
    if foreign := next((outcome for outcome in outcomes if outcome.id not in manifest.by_id), None):
        raise ArtefactError(
            f"{folder} holds an image of arm {foreign.arm}, case {foreign.case} that this manifest doesn't ask for: its prompts, seeds, "
            "guards or settings are others; choose another folder, or remove this one"
        )
    return outcomes


def outcomes_name(shard: Shard) -> str:
    """The file of a shard's lines."""
    return OUTCOMES if shard is None else f"outcomes-{shard[0]}-of-{shard[1]}.jsonl"


def line_of(outcome: Outcome) -> str:
    """An outcome as a line."""
    return json.dumps(outcome.to_json()) + "\n"


def read_outcomes(folder: Path) -> list[Outcome]:
    """All outcomes of a run so far, of all shards; a line that an interruption cut short counts as not written.

    Raises:
        ArtefactError: for a damaged line, or one image with two hashes.
    """
    found: dict[tuple[str, str], Outcome] = {}
    for file in sorted(folder.glob("outcomes*.jsonl")):
        for outcome in read_file(file):
            first = found.setdefault((outcome.arm, outcome.case), outcome)
            if (first.id, first.sha256) != (outcome.id, outcome.sha256):
                raise ArtefactError(
                    f"{folder} has two different images for arm {outcome.arm}, case {outcome.case} (hashes {first.sha256} and "
                    f"{outcome.sha256}); remove one of the lines from {file.name}"
                )
    return list(found.values())


def read_file(file: Path) -> list[Outcome]:
    """The outcomes of one file."""
    outcomes = []
    for number, line in enumerate(read_lines(file, REMAKE), 1):
        try:
            outcome = Outcome(**line)
        except TypeError as error:
            raise ArtefactError(f"{file}, line {number} is damaged ({error}); {REMAKE}") from error
        if outcome.image != image_of(outcome.arm, outcome.case):
            raise ArtefactError(f"{file}, line {number} is damaged (its image is {outcome.image!r}); {REMAKE}")
        outcomes.append(outcome)
    return outcomes


def read_picture(folder: Path, outcome: Outcome) -> Pixels:
    """The stored image of an outcome, [height, width, 3].

    Raises:
        ArtefactError: if it is gone or damaged.
    """
    return read_png(folder / outcome.image)


def read_png(path: Path) -> Pixels:
    """A stored image, [height, width, 3].

    Raises:
        ArtefactError: if it is gone or damaged.
    """
    try:
        return from_png(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} can't be read ({error}); remove its line from {OUTCOMES} to make it again") from error


def _repair(file: Path) -> None:
    """Cuts off what an interruption left of a last line."""
    whole = "".join(json.dumps(line) + "\n" for line in read_lines(file, REMAKE)).encode()
    if file.is_file() and file.read_bytes() != whole:
        write_atomically(file, whole)


def _forget(files: Iterable[Path], ids: set[str]) -> None:
    for file in (file for file in files if file.is_file()):
        kept = [outcome for outcome in read_file(file) if outcome.id not in ids]
        write_atomically(file, "".join(map(line_of, kept)).encode())
