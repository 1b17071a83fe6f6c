"""Greedy coordinate search over words: gradients propose, the guarded system disposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .words import Template, Words

CALM = -0.5
"""A guard that is this far from its limit needs no more calming."""


class Worth(NamedTuple):
    """What prompts are worth; less is better."""

    soft: Tensor
    """What the search follows, [prompts]."""
    hard: Tensor
    """What counts when it is to be shown, [prompts]."""


class Judge(Protocol):
    """Tells what prompts are worth; `owners` are the places of the cases they are for."""

    def values(self, owners: Sequence[int], prompts: Sequence[str]) -> Worth:
        """What they are worth."""
        ...

    def gradients(self, owners: Sequence[int], templates: Sequence[Template], prompts: Sequence[str]) -> tuple[Worth, Tensor]:
        """The same, and by how much each word would change the soft value in each gap, [prompts, slots, words]."""
        ...

    def alarms(self, owners: Sequence[int], prompts: Sequence[str]) -> Tensor | None:
        """By how much prompts alarm a guard before anything is generated, [prompts]; None: nothing is decided there."""
        ...


class Found(NamedTuple):
    """What one prompt is worth, and the words in its gaps."""

    soft: float
    hard: float
    words: tuple[int, ...]


@dataclass
class Hunt:
    """The search for one case."""

    template: Template
    random: torch.Generator
    current: tuple[int, ...] = ()
    """The words in the gaps."""
    value: float = float("inf")
    known: dict[str, Found] = field(default_factory=dict)
    """Every prompt that was looked at."""
    shown: set[str] = field(default_factory=set)
    """Those of which pictures were made."""
    trace: list[float] = field(default_factory=list)

    def best_unseen(self) -> str | None:
        """The most promising prompt of which there is no picture yet."""
        fresh = [(found.hard, prompt) for prompt, found in self.known.items() if prompt not in self.shown]
        return min(fresh)[1] if fresh else None

    def leave(self, prompt: str) -> None:
        """A picture of a prompt has failed: the search goes on from the best of the others."""
        self.shown.add(prompt)
        fresh = [(found.soft, found.words) for prompt, found in self.known.items() if prompt not in self.shown]
        if fresh:
            self.value, self.current = min(fresh)

    def learn(self, prompt: str, found: Found) -> None:
        """Takes in what a prompt is worth."""
        self.known[prompt] = found
        if found.soft < self.value:
            self.value, self.current = found.soft, found.words


@dataclass
class WordSearch:
    """Finds words for the gaps of several prompts together."""

    words: Words
    candidates: int
    """So many prompts are looked at for each case in each iteration."""
    top: int
    """They are drawn from so many substitutions, those that the gradient finds best."""
    breadth: int = 1
    """So many times as many are proposed, where a guard decides by the prompt alone: those that alarm it least are looked at."""

    def begin(self, hunts: Sequence[Hunt], judge: Judge) -> None:
        """Begins with the best of random words."""
        count = len(self.words.texts)
        drawn = [
            [torch.randint(count, (hunt.template.slots,), generator=hunt.random).tolist() for _ in range(self.candidates * self.breadth)]
            for hunt in hunts
        ]
        self._learn(hunts, self._sifted(hunts, drawn, judge), judge)

    def iterate(self, hunts: Sequence[Hunt], judge: Judge) -> None:
        """One round of proposals for each case."""
        prompts = [self.prompt(hunt, hunt.current) for hunt in hunts]
        now, gradients = judge.gradients(range(len(hunts)), [hunt.template for hunt in hunts], prompts)
        proposed = []
        for owner, hunt in enumerate(hunts):
            hunt.known[prompts[owner]] = Found(float(now.soft[owner]), float(now.hard[owner]), hunt.current)
            proposed.append(self._propose(hunt, gradients[owner, : hunt.template.slots]))
        self._learn(hunts, self._sifted(hunts, proposed, judge), judge)

    def _sifted(self, hunts: Sequence[Hunt], proposed: Sequence[list[list[int]]], judge: Judge) -> list[list[list[int]]]:
        """Of each case's proposals, those that alarm guards least; among calm ones, the first."""
        if self.breadth == 1:
            return [own[: self.candidates] for own in proposed]
        owners = [owner for owner, own in enumerate(proposed) for _ in own]
        found = judge.alarms(owners, [self.prompt(hunts[owner], words) for owner, own in enumerate(proposed) for words in own])
        if found is None:
            return [own[: self.candidates] for own in proposed]
        rest, kept = iter(found.clamp_min(CALM).tolist()), []
        for own in proposed:
            alarm = [next(rest) for _ in own]
            kept.append([own[index] for index in sorted(range(len(own)), key=alarm.__getitem__)[: self.candidates]])
        return kept

    def prompt(self, hunt: Hunt, words: Sequence[int]) -> str:
        """The prompt with words in its gaps."""
        return hunt.template.fill([self.words.texts[word] for word in words])

    def _learn(self, hunts: Sequence[Hunt], chosen: Sequence[Sequence[Sequence[int]]], judge: Judge) -> None:
        owners = [owner for owner, own in enumerate(chosen) for _ in own]
        words = [one for own in chosen for one in own]
        prompts = [self.prompt(hunts[owner], one) for owner, one in zip(owners, words, strict=True)]
        if prompts:
            worth = judge.values(owners, prompts)
            found = [Found(*row) for row in zip(worth.soft.tolist(), worth.hard.tolist(), map(tuple, words), strict=True)]
            for owner, prompt, one in zip(owners, prompts, found, strict=True):
                hunts[owner].learn(prompt, one)
        for hunt in hunts:
            hunt.trace.append(hunt.value)

    def _propose(self, hunt: Hunt, gradient: Tensor) -> list[list[int]]:
        """Substitutions that the gradient [slots, words] finds good: the best ones, and random ones in pairs."""
        change = gradient - gradient.gather(1, torch.tensor(hunt.current, device=gradient.device)[:, None])
        moves = [divmod(index, change.shape[1]) for index in change.flatten().argsort()[: self.top].tolist()]
        wanted = self.candidates * self.breadth
        drawn = torch.randint(len(moves), (2 * wanted, 2), generator=hunt.random).tolist()
        plans = [(move,) for move in moves[: wanted // 2]] + [(moves[first], moves[second]) for first, second in drawn]
        proposals: dict[tuple[int, ...], None] = {}
        for plan in plans:
            words = list(hunt.current)
            for slot, word in plan:
                words[slot] = word
            if len(proposals) < wanted and self.prompt(hunt, words) not in hunt.known:
                proposals[tuple(words)] = None
        return [list(words) for words in proposals]
