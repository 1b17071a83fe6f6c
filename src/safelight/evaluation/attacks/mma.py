"""MMA-Diffusion, text modality: a prompt without sensitive words that means the same to the text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...generator import Generator
from ...method import Method
from ..attack import Attack, Attempt, Progress, Success
from ..case import Case
from ..trials import Trials
from ..white_box.search import Hunt, WordSearch, Worth
from ..white_box.soft import SoftTokens
from ..white_box.words import Template, TextEncoder, Words

Count = Annotated[int, Ge(1)]
TOGETHER = 512
"""So many prompts go through a text encoder at once."""


@dataclass(kw_only=True, eq=False)
class MMA(Attack):
    """Replaces words, as gradients propose, until text encoders find the prompt similar to the unsafe one (Yang et al., 2023, https://arxiv.org/abs/2311.17516).

    The text modality of MMA-Diffusion. It maximises the cosine with the original prompt's embedding, begins with random words, and
    never uses sensitive ones, which a filter would find. It sees text encoders only, neither the denoiser nor the guard.
    """

    banned: tuple[str, ...] | None = None
    """Sensitive words that it must not use. By default the testbed's plain names of unsafe objects and styles."""
    length: Count = 20
    """So many words, less where a text encoder doesn't read so many; published: 20."""
    iterations: Annotated[int, Ge(0)] = 40
    """Rounds of gradients and substitutions; published: 1,000."""
    candidates: Count = 32
    """So many substitutions are looked at for each case in each round; published: 512."""
    top: Count = 256
    """They are drawn from so many, those that the gradient finds best."""
    tries: Count = 2
    """So many of the best prompts are made pictures of."""
    batch: Count = 16
    """So many cases are attacked together."""
    seed: int = 0
    """Of the attack's own randomness."""

    def __call__(
        self, generator: Generator, methods: Sequence[Method], cases: Sequence[Case], success: Success, progress: Progress = lambda *_: None
    ) -> list[Attempt]:  # fmt: skip
        """One attempt per case."""
        words = Words.of(generator.pipe, _sensitive() if self.banned is None else self.banned)
        trials = Trials(generator, methods, success, cases, self.batch)
        hunts: list[Hunt] = []
        for start in range(0, len(cases), self.batch):
            progress(self.name, start, len(cases))
            hunts += self._search(words, cases[start : start + self.batch])
        for _ in range(self.tries):
            made = {index: hunts[index].best_unseen() for index in trials.open}
            trials.show(made)
            for index, prompt in made.items():
                hunts[index].shown.add(prompt or "")
        progress(self.name, len(cases), len(cases))
        return [trials.attempt(index, cases[index].prompt, self.iterations, hunt.trace) for index, hunt in enumerate(hunts)]

    def _search(self, words: Words, cases: Sequence[Case]) -> list[Hunt]:
        template = Template((None,) * min(self.length, words.room))
        hunts = [Hunt(template, torch.Generator().manual_seed(self.seed * 1_000_003 + case.seed)) for case in cases]
        likeness = _Likeness(words, [case.prompt for case in cases])
        search = WordSearch(words, self.candidates, self.top)
        search.begin(hunts, likeness)
        for _ in range(self.iterations):
            search.iterate(hunts, likeness)
        return hunts


class _Likeness:
    """How far prompts are from the original ones: 1 - cosine, the mean over text encoders."""

    def __init__(self, words: Words, originals: Sequence[str]) -> None:
        self.words = words
        with torch.no_grad():
            self.goals = [pooled(encoder, originals) for encoder in words.encoders]

    def values(self, owners: Sequence[int], prompts: Sequence[str]) -> Worth:
        """What they are worth."""
        with torch.no_grad():
            parts = [self._value(owners[i : i + TOGETHER], prompts[i : i + TOGETHER]) for i in range(0, len(prompts), TOGETHER)]
        value = torch.cat(parts)
        return Worth(value, value)

    def gradients(self, owners: Sequence[int], templates: Sequence[Template], prompts: Sequence[str]) -> tuple[Worth, Tensor]:
        """The same, and by how much each word would change it, [prompts, slots, words]."""
        soft = SoftTokens(self.words.encoders, templates, prompts)
        with torch.enable_grad(), soft.added():
            value = self._value(owners, prompts)
            deltas = torch.autograd.grad(value.sum(), soft.deltas)
        return Worth(value.detach(), value.detach()), self.words.gradients(deltas)[soft.first_of_equals()]

    def alarms(self, owners: Sequence[int], prompts: Sequence[str]) -> None:
        """The guard isn't looked at."""

    def _value(self, owners: Sequence[int], prompts: Sequence[str]) -> Tensor:
        chosen = torch.tensor(owners)
        near = [cosine_similarity(pooled(e, prompts), goal[chosen]) for e, goal in zip(self.words.encoders, self.goals, strict=True)]
        return 1 - torch.stack(near).mean(dim=0)


def pooled(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """The pooled embeddings of an encoder, or the mean of its last layer over the text where it has none, [prompts, width]."""
    ids = encoder.ids(prompts).to(encoder.table.device)
    output = encoder.net(ids)
    own = getattr(output, "pooler_output", None)
    own = getattr(output, "text_embeds", None) if own is None else own
    if own is not None:
        return own.float()  # type: ignore[no-any-return]
    padding = encoder.tokenizer.pad_token_id
    inside = (ids != padding)[..., None] if padding is not None else torch.ones_like(ids, dtype=torch.bool)[..., None]
    return (output.last_hidden_state.float() * inside).sum(dim=1) / inside.sum(dim=1)  # type: ignore[no-any-return]


def _sensitive() -> tuple[str, ...]:
    from ...testbed.world import STYLES, UNSAFE

    return (*UNSAFE, *(word for style in STYLES for word in style.split()))
