"""A known domain of risk, and a new one of which there is little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..bank import Pair
from ..testbed.pairs import concept_pairs, safe_captions
from ..testbed.world import DOMAINS, UNSAFE
from .prompt_pairs import read_prompts


@dataclass(frozen=True)
class Domains:
    """What safety dictionaries are made from."""

    source: Sequence[Pair]
    target: Sequence[Pair]
    benign: Sequence[str]
    """Prompts without any risk."""
    names: tuple[str, str] = ("source", "target")


def read_domains(source: Path, target: Path, benign: Path, names: tuple[str, str]) -> Domains:
    """Pairs from tables with the columns unsafe and safe (and optionally category), benign prompts from a text file.

    Raises:
        ValueError: naming file, row, and what is wrong with it.
    """
    known, new = read_prompts(source, benign, names[0]), read_prompts(target, None, names[1])
    return Domains(known.pairs, new.pairs, known.benign, names)


def from_testbed(source: str, target: str, *, pairs: int = 240, target_pairs: int = 64, benign: int = 700, seed: int = 0) -> Domains:
    """Pairs of two of the testbed's domains from the training split, in plain names, and captions of safe scenes."""
    random = Random(f"domains/{source}/{target}/{seed}")
    found = []
    for name, other, count in ((source, target, pairs), (target, source, target_pairs)):
        strangers = DOMAINS.get(other, (other,))
        own = [pair for pair in concept_pairs(random, name, 3 * count) if not set(_words(pair.unsafe)) & set(strangers)]
        found.append([_by_object(pair) for pair in own[:count]])
    return Domains(found[0], found[1], safe_captions(random, benign), (source, target))


def _words(text: str) -> list[str]:
    return text.replace(",", " ").replace(":", " ").split()


def _by_object(pair: Pair) -> Pair:
    """With the unsafe object that it names as its category, as risk categories are in a real domain."""
    return pair._replace(category=next((word for word in _words(pair.unsafe) if word in UNSAFE), pair.category))
