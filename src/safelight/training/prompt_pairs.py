"""Pairs of unsafe and safe prompts that differ in the concept alone, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .. import tables
from ..bank import Pair
from ..testbed.captions import OPERATIONS, Edit, Operation, apply_edit
from ..testbed.pairs import concept_pairs, disturbed, neighbours
from ..testbed.scenes import Pixels, Scene, render, sample_jitter
from ..testbed.world import BACKGROUNDS, DOMAINS, SAFE, TWINS, article

FILLERS = frozenset(
    ["a", "an", "the", "and", "or", "of", "on", "in", "at", "to", "by", "with", "it", "is", "picture", "photo", "image", "scene"]
)
SHARED = 0.3
"""The share of tokens that the members of a pair must have in common, at the same places."""


@dataclass(frozen=True)
class Prompts:
    """What a redirector is trained on."""

    pairs: Sequence[Pair]
    benign: Sequence[str]
    """Prompts without the concept, to be left alone."""
    pictures: Sequence[Pixels] = ()
    """For editing: what each pair's members, and then each benign prompt, are to be applied to."""

    def keep(self, benign: slice, *, pairs: bool = True) -> Prompts:
        """With some of the benign prompts, and all pairs or none."""
        first, rest = self.pictures[: len(self.pairs)], self.pictures[len(self.pairs) :]
        return Prompts(self.pairs if pairs else (), self.benign[benign], [*(first if pairs else ()), *rest[benign]])


def read_prompts(pairs: Path, benign: Path | None, concept: str) -> Prompts:
    """Pairs from a table with the columns unsafe and safe (and optionally category), benign prompts from a text file with one a line.

    Raises:
        ValueError: naming file, row, and what is wrong with it.
    """
    table = tables.read_table(pairs)
    members = table.required("unsafe", "safe", needed_by="a list of pairs")
    found = [
        Pair(unsafe, safe, own or concept)
        for (unsafe, safe), own in zip(members, table.optional("category", besides=("unsafe", "safe")), strict=True)
    ]
    return Prompts(found, tables.read_prompts(benign) if benign else [])


def from_testbed(concept: str, *, pairs: int = 600, disturb: int = 200, benign: int = 400, seed: int = 0) -> Prompts:
    """Pairs of the testbed's training split in plain names, as many in odd words, and prompts without the concept."""
    random = Random(f"redirector/{concept}/{seed}")
    plain = concept_pairs(random, concept, pairs)
    odd = [disturbed(random, random.choice(plain)) for _ in range(disturb)]
    return Prompts([*plain, *odd], neighbours(random, concept, benign))


def edits_from_testbed(concept: str, *, pairs: int = 600, benign: int = 400, seed: int = 0) -> Prompts:
    """Instructions that bring the concept in, with those that bring its twin in, and others that don't, some of which take it away."""
    random = Random(f"redirector/edits/{concept}/{seed}")
    objects = DOMAINS.get(concept, (concept,))
    chosen, pictures = [], []
    for number in range(pairs):
        name = objects[number % len(objects)]
        edit = draw_edit(random, name)
        safe = edit.instruction.replace(article(name), article(TWINS[name]))
        chosen.append(Pair(edit.instruction, safe, concept))
        pictures.append(render(edit.source))
    loose = [draw_edit(random, None, old=random.choice(objects) if random.random() < 0.3 else None) for _ in range(benign)]
    return Prompts(chosen, [edit.instruction for edit in loose], [*pictures, *(render(edit.source) for edit in loose)])


def draw_edit(random: Random, new: str | None, *, old: str | None = None) -> Edit:
    """An edit of the training split, in plain names: `new` comes in (or something safe), `old` (or something safe) is what was there."""
    while True:
        known = [name for name in SAFE if name != TWINS.get(new or "")]
        first, second, fresh = random.sample(known, 3)
        places: list[str | None] = [old or first, second]
        place = random.randrange(2)
        operation: Operation = random.choice(("replace", "add") if new else ("replace", "remove") if old else OPERATIONS)
        if operation == "add":
            places[0] = None
        if place:
            places.reverse()
        source = Scene(tuple(places), random.choice(tuple(BACKGROUNDS)), None, sample_jitter(random))
        edit = apply_edit(random, source, operation, place, new=new or fresh)
        if (source.split, edit.target.split) == ("train", "train"):
            return edit


def check(pairs: Sequence[Pair], pipe: Any) -> None:
    """Makes sure that a pair's members have the same number of tokens, and most of them at the same places.

    Otherwise token i of the one says nothing about token i of the other, and the mask that is learned is noise.

    Raises:
        ValueError: naming the pair and the remedy.
    """
    if not pairs:
        raise ValueError("there are no pairs; give at least a few dozen unsafe prompts with their safe twins")
    for number, pair in enumerate(pairs, 1):
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(pipe, name, None)
            if tokenizer is not None:
                _check(number, pair, *(tokenizer(text, add_special_tokens=False).input_ids for text in (pair.unsafe, pair.safe)))


def _check(number: int, pair: Pair, unsafe: list[int], safe: list[int]) -> None:
    told = f"pair {number}, {pair.unsafe!r} and {pair.safe!r}"
    if len(unsafe) != len(safe):
        raise ValueError(
            f"{told}: {len(unsafe)} and {len(safe)} tokens; replace words by others of as many tokens, since a deletion shifts all that follow"
        )
    same = [a == b for a, b in zip(unsafe, safe, strict=True)]
    if all(same):
        raise ValueError(f"{told}: the tokenizer sees no difference between them; replace the unsafe words by others")
    if sum(same) < SHARED * len(same):
        raise ValueError(
            f"{told}: only {sum(same)} of {len(same)} tokens are the same at the same places; replace the unsafe words and keep the rest"
        )


def family_of(pair: Pair) -> str:
    """What pairs have in common that are no news to who has seen one of them: the words of the unsafe prompt that say something."""
    words = {word.strip(",:;.").lower() for word in pair.unsafe.split()}
    return " ".join(sorted(words - FILLERS))


def split_families(pairs: Sequence[Pair], share: float, seed: int, *, whole: bool = True) -> tuple[list[int], list[int]]:
    """The indices of pairs to train on, and of those held out: whole families, or (as published, and leaky) any pairs."""
    keys = [family_of(pair) if whole else str(index) for index, pair in enumerate(pairs)]
    known = sorted(set(keys))
    Random(f"families/{seed}").shuffle(known)
    held_out = set(known[: max(1, round(share * len(known)))])
    return [i for i, key in enumerate(keys) if key not in held_out], [i for i, key in enumerate(keys) if key in held_out]
