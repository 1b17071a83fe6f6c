"""Ring-A-Bell: words whose embedding is that of the prompt with more of the concept in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from ...generator import Generator
from ...method import Method
from ..attack import Attack, Attempt, Progress, Success
from ..case import Case
from ..trials import Trials
from ..white_box.words import TextEncoder, Words

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Pairs = Sequence[tuple[str, str]]
"""Prompts with a concept, and the same without."""
TOGETHER = 512
"""So many prompts go through the text encoder at once."""


@dataclass(kw_only=True, eq=False)
class RingABell(Attack):
    """Searches words whose embedding is near E(prompt) + η c, with c a concept's direction (Tsai et al., 2023, https://arxiv.org/abs/2310.10012).

    c is the mean difference of embeddings of prompts with and without the concept. A genetic algorithm looks for K words; it sees a
    text encoder only (the pipeline's own first one), neither the generator nor the guard.
    """

    pairs: Mapping[str, Pairs] | None = field(default=None, metadata={"artefact": "pairs"})
    """By category, prompts with and without what is unsafe. By default the testbed's, of the object that a case names (dev split)."""
    eta: Annotated[float, Ge(0)] = 1.0
    """η: how much of the concept is added; published: 2 to 5.5, there for prompts that hardly name it."""
    length: Count = 16
    """K: so many words, less where the text encoder doesn't read so many; published: 16, 38 or 77."""
    population: Annotated[int, Ge(4)] = 48
    """So many candidates for each case; published: 200."""
    generations: Annotated[int, Ge(0)] = 60
    """Published: 3,000."""
    mutation: Share = 0.25
    """The share of offspring of which one word is exchanged."""
    crossover: Share = 0.5
    """The share of the population that is replaced by offspring of the rest."""
    tries: Count = 2
    """So many of the best candidates are made pictures of."""
    banned: tuple[str, ...] = ()
    """Words that the attack must not use."""
    batch: Count = 16
    """So many cases are attacked together."""
    seed: int = 0
    """Of the attack's own randomness."""

    def __call__(
        self, generator: Generator, methods: Sequence[Method], cases: Sequence[Case], success: Success, progress: Progress = lambda *_: None
    ) -> list[Attempt]:  # fmt: skip
        """One attempt per case."""
        words = Words.of(generator.pipe, self.banned)
        concepts = {key: self._concept(words.encoders[0], key) for key in dict.fromkeys(self._key(case) for case in cases)}
        trials = Trials(generator, methods, success, cases, self.batch)
        found: list[tuple[list[str], list[float]]] = []
        for start in range(0, len(cases), self.batch):
            progress(self.name, start, len(cases))
            some = cases[start : start + self.batch]
            found += self._search(words, some, torch.stack([concepts[self._key(case)] for case in some]))
        for place in range(self.tries):
            trials.show({index: found[index][0][place] for index in trials.open if place < len(found[index][0])})
        progress(self.name, len(cases), len(cases))
        return [trials.attempt(index, prompts[0], self.generations, trace) for index, (prompts, trace) in enumerate(found)]

    def _key(self, case: Case) -> str:
        """The name of the concept that a case is after."""
        if self.pairs is None and case.truth is not None and (case.truth.unsafe or case.truth.style):
            return case.truth.unsafe[0] if case.truth.unsafe else case.truth.style or ""
        return case.category

    def _concept(self, encoder: TextEncoder, key: str) -> Tensor:
        """c, [tokens, width].

        Raises:
            ValueError: if there are no pairs of that concept.
        """
        known = _testbed_pairs(key) if self.pairs is None else self.pairs.get(key, ())
        if not known:
            raise ValueError(f"Ring-A-Bell needs prompts with and without {key!r}; give some as pairs={{{key!r}: [(with, without), …]}}")
        return (embed(encoder, [one for one, _ in known]) - embed(encoder, [other for _, other in known])).mean(dim=0)

    def _search(self, words: Words, cases: Sequence[Case], concepts: Tensor) -> list[tuple[list[str], list[float]]]:
        """The genetic algorithm: each case's best prompts, the best first, and the loss by generation."""
        encoder = words.encoders[0]
        goals = embed(encoder, [case.prompt for case in cases]) + self.eta * concepts  # [cases, tokens, width]
        length = min(self.length, words.room)
        chances = [torch.Generator().manual_seed(self.seed * 1_000_003 + case.seed) for case in cases]
        count = len(words.texts)
        people = torch.stack([torch.randint(count, (self.population, length), generator=chance) for chance in chances])
        losses = self._losses(words, people, goals)
        traces = [[float(loss)] for loss in losses.amin(dim=1)]
        elite = max(2, self.population - round(self.crossover * self.population))
        for _ in range(self.generations):
            order = losses.argsort(dim=1, stable=True)[:, :elite]
            kept, worth = people.gather(1, order[..., None].expand(-1, -1, length)), losses.gather(1, order)
            young = torch.stack(
                [self._offspring(own, self.population - elite, count, chance) for own, chance in zip(kept, chances, strict=True)]
            )
            people = torch.cat([kept, young], dim=1)
            losses = torch.cat([worth, self._losses(words, young, goals)], dim=1)
            for trace, loss in zip(traces, losses.amin(dim=1).tolist(), strict=True):
                trace.append(loss)
        return [(self._ranked(words, own, worth), trace) for own, worth, trace in zip(people, losses, traces, strict=True)]

    def _losses(self, words: Words, people: Tensor, goals: Tensor) -> Tensor:
        """Mean squared distance to each case's goal, [cases, people]."""
        prompts = [" ".join(words.texts[word] for word in one) for own in people.tolist() for one in own]
        embeddings = embed(words.encoders[0], prompts).unflatten(0, people.shape[:2])
        return (embeddings - goals[:, None]).square().mean(dim=(2, 3))

    def _offspring(self, parents: Tensor, count: int, words: int, chance: torch.Generator) -> Tensor:
        """Children of parents [elite, length]: the beginning of one and the end of another, some with one word exchanged."""
        length = parents.shape[1]
        first, second = (torch.randint(len(parents), (count,), generator=chance) for _ in range(2))
        cut = torch.randint(1, max(2, length), (count, 1), generator=chance)
        children = torch.where(torch.arange(length) < cut, parents[first], parents[second])
        mutated = torch.rand(count, generator=chance) < self.mutation
        mutated |= (children == parents[first]).all(dim=1) | (children == parents[second]).all(dim=1)  # twins teach nothing
        place = torch.randint(length, (count,), generator=chance)
        children[mutated, place[mutated]] = torch.randint(words, (int(mutated.sum()),), generator=chance)
        return children

    def _ranked(self, words: Words, people: Tensor, losses: Tensor) -> list[str]:
        order = losses.argsort(stable=True).tolist()
        texts = (" ".join(words.texts[word] for word in people[index].tolist()) for index in order)
        return list(dict.fromkeys(texts))[: self.tries]


@torch.no_grad()
def embed(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Token embeddings of an encoder's last layer, [prompts, tokens, width]."""
    device = encoder.table.device
    parts = [
        encoder.net(encoder.ids(prompts[i : i + TOGETHER]).to(device)).last_hidden_state.float().cpu()
        for i in range(0, len(prompts), TOGETHER)
    ]
    return torch.cat(parts)


def _testbed_pairs(key: str) -> list[tuple[str, str]]:
    """Prompts of the development split that name a concept, and the same with its harmless twin."""
    from ...testbed.pairs import PLAIN_STYLE
    from ...testbed.world import DOMAINS, STYLES, TWINS, UNSAFE
    from ..benchmarks.testbed import find

    if key not in (*DOMAINS, *UNSAFE, *STYLES):
        return []
    pairs = []
    for case in find(f"testbed-dev/{key.replace(' ', '-')}").cases(DRAWN):
        text = case.prompt.replace(key, PLAIN_STYLE)
        for name in UNSAFE:
            text = text.replace(name, TWINS[name])
        pairs.append((case.prompt, text))
    return pairs


DRAWN = 16
"""So many prompts of the testbed make a concept."""
