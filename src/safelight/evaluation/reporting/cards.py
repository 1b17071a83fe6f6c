"""The before/after grid: which cases to show, and what is said beside their pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..runs.store import read_picture, read_png
from .run_folder import Pair, RunFolder

THUMBNAIL = 256
"""Larger pictures are reduced to so many pixels."""


@dataclass(frozen=True)
class Card:
    """One case of the grid."""

    id: str
    prompt: str
    seed: int | None
    source: str | None
    base: str
    guard: str | None
    """Data URIs; no guarded picture where it is the unguarded one, bit by bit."""
    tags: tuple[str, ...]
    """unsafe, flagged, changed, example: what the page filters by."""
    notes: tuple[str, ...]
    record: str


@dataclass(frozen=True)
class Grid:
    """The cases of one part that a page shows."""

    cards: Sequence[Card]
    total: int

    def count(self, tag: str) -> int:
        """How many cards have a tag; `all` counts all."""
        return sum(tag == "all" or tag in card.tags for card in self.cards)


def grid(run: RunFolder, part: str, count: int) -> Grid:
    """The most telling cases of a part: those that findings name, still unsafe ones, flagged or changed ones, then the others."""
    named = {example for finding in run.results.get("diagnosis", {}).get("findings", ()) for example in finding["examples"]}
    pairs = sorted(run.parts[part], key=lambda pair: _rank(pair, part, named))[:count]
    chosen = [_card(run.folder / part, pair, part, named) for pair in sorted(pairs, key=lambda pair: pair.base.case)]
    return Grid(chosen, len(run.parts[part]))


def _rank(pair: Pair, part: str, named: Collection[str]) -> tuple[bool, bool, bool, str]:
    surprising = pair.flagged if part != "unsafe" else not pair.flagged
    return f"{part}/{pair.base.case}" not in named, not pair.unsafe("guard"), not (surprising or not pair.identical), pair.base.case


def _card(out: Path, pair: Pair, part: str, named: Collection[str]) -> Card:
    tags = {
        "unsafe": bool(pair.unsafe("guard")),
        "flagged": pair.flagged,
        "changed": not pair.identical,
        "example": f"{part}/{pair.base.case}" in named,
    }
    return Card(
        pair.base.case, pair.judged.prompt, pair.judged.seed,
        None if pair.source is None else data_uri(read_png(pair.source)),
        data_uri(read_picture(out, pair.base)), None if pair.identical else data_uri(read_picture(out, pair.guard)),
        tuple(tag for tag, true in tags.items() if true), tuple(_notes(pair)), json.dumps(pair.record, indent=1),
    )  # fmt: skip


def _notes(pair: Pair) -> list[str]:
    told = [
        _action(action) for action in pair.record.get("actions", ()) if action.get("flagged") or action.get("action") not in (None, "none")
    ]
    judges = list(pair.judged.seen)
    if pair.judged.unsafe and judges:
        seen = pair.unsafe("guard")
        told.append(
            "judged safe by all"
            if not seen
            else f"still unsafe: {', '.join(seen)}"
            if len(seen) < len(judges)
            else "still unsafe: all judges"
        )
    return told


def _action(action: dict[str, Any]) -> str:
    words = [f"{action['method']}: {action.get('action') or 'none'}"]
    if action.get("flagged") and action.get("concept"):
        words.append(str(action["concept"]))
    if action.get("score") is not None and action.get("threshold") is not None:
        words.append(f"score {action['score']:.2f}, limit {action['threshold']:.2f}")
    return ", ".join(words)


def seeds(pairs: Sequence[Pair]) -> str | None:
    """The random seeds of some cases, as a range; None if they aren't known."""
    known = sorted({pair.judged.seed for pair in pairs if pair.judged.seed is not None})
    if not known:
        return None
    whole = known == list(range(known[0], known[-1] + 1))
    return (
        f"{known[0]} to {known[-1]}" if whole and len(known) > 1 else ", ".join(map(str, known[:20])) + (", …" if len(known) > 20 else "")
    )


def data_uri(picture: Any) -> str:
    """A picture [height, width, 3] of bytes as a PNG in a data URI."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
