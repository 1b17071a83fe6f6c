"""How good adversarial prompts are, before any picture is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...generator import Generator
from ...method import Method
from ..case import Case
from .search import Worth
from .soft import SoftTokens
from .targets import Target
from .through import View, look
from .words import Template, Words

STEEP = 4.0
"""How steeply the soft gate rises over the typical distance of the original prompts from the limit."""
SIFTED = 256
"""So many prompts go through the text encoders at once."""


@dataclass
class Objective:
    """The error of the prediction through the guard, its decisions taken softly.

    A decision weighs the guarded and the bare prediction by g = σ(margin): the attack can both evade it and beat what it sets off.
    """

    generator: Generator
    methods: Sequence[Method]
    cases: Sequence[Case]
    target: Target
    words: Words
    hinge: float = 0.1
    """How much it counts by itself that a decision goes the attack's way."""
    chunk: int = 48
    """So many prompts go through the denoiser at once."""
    scales: dict[int, float] = field(default_factory=dict)
    """The typical margin of each decision."""
    skim: bool = False
    """Whether the denoiser is spared in earlier steps, as what it would say there makes no difference to these guards."""
    memory: dict[tuple[bytes, ...], Tensor] = field(default_factory=dict, repr=False)

    def begin(self) -> None:
        """Looks at the original prompts, and learns from them what margins are typical and whether earlier steps matter."""
        everyone, prompts = range(len(self.cases)), [case.prompt for case in self.cases]
        same = len(self.target.latents) > 1
        for start in range(0, len(prompts), self.chunk):
            some = slice(start, start + self.chunk)
            self.skim = False
            whole = self._look(everyone[some], prompts[some], graph=False)
            self._margins(whole, len(prompts[some]))
            if same:
                self.skim = True
                same = _alike(whole, self._look(everyone[some], prompts[some], graph=False))
        self.skim = same

    def of(self, cases: Sequence[int]) -> Objective:
        """The same for some of the cases; what is remembered is shared."""
        return replace(self, cases=[self.cases[index] for index in cases], target=self.target.take(cases))

    def values(self, owners: Sequence[int], prompts: Sequence[str]) -> Worth:
        """What prompts for some cases are worth."""
        parts = []
        for start in range(0, len(prompts), self.chunk):
            some = slice(start, start + self.chunk)
            parts.append(self._value(owners[some], self._look(owners[some], prompts[some], graph=False)))
        return Worth(*map(torch.cat, zip(*parts, strict=True)))

    def alarms(self, owners: Sequence[int], prompts: Sequence[str]) -> Tensor | None:
        """The soft margins of what guards decide before the denoiser is called, which cost little, [prompts]; None: they decide nothing."""
        parts = []
        for start in range(0, len(prompts), SIFTED):
            view = self._look(owners[start : start + SIFTED], prompts[start : start + SIFTED], graph=False, before=True)
            if not view.margins:
                return None
            parts.append(self._margins(view, len(prompts[start : start + SIFTED]))[0])
        return torch.cat(parts)

    def gradients(self, owners: Sequence[int], templates: Sequence[Template], prompts: Sequence[str]) -> tuple[Worth, Tensor]:
        """The same, and by how much each word would change the soft value in each gap, to first order, [prompts, slots, words]."""
        values, gradients = [], []
        for start in range(0, len(prompts), self.chunk):
            some = slice(start, start + self.chunk)
            soft = SoftTokens(self.words.encoders, templates[some], prompts[some])
            with soft.added():
                value = self._value(owners[some], self._look(owners[some], prompts[some], graph=True))
            deltas = torch.autograd.grad(value.soft.sum(), soft.deltas, allow_unused=True)
            known = [torch.zeros_like(zero) if delta is None else delta for delta, zero in zip(deltas, soft.deltas, strict=True)]
            values.append(Worth(value.soft.detach(), value.hard.detach()))
            gradients.append(self.words.gradients(known)[soft.first_of_equals()])
        return Worth(*map(torch.cat, zip(*values, strict=True))), torch.cat(gradients)

    def _look(self, owners: Sequence[int], prompts: Sequence[str], *, graph: bool, before: bool = False) -> View:
        requests: list[Any] = [replace(self.cases[owner], prompt=prompt) for owner, prompt in zip(owners, prompts, strict=True)]
        latents = () if before else self.target.take(owners).latents
        view = View(latents, graph=graph, skim=self.skim, memory=self.memory)
        return look(self.generator, self.methods, requests, view)

    def _value(self, owners: Sequence[int], view: View) -> Worth:
        assert view.guarded is not None
        assert view.bare is not None
        target = self.target.take(owners)
        margins, decided = self._margins(view, len(owners))
        gate = torch.where(decided, margins.sigmoid(), 1.0).to(view.guarded)
        blend = torch.lerp(view.bare, view.guarded, gate.view(-1, *[1] * (view.guarded.ndim - 1)))
        soft = target.error(blend) + self.hinge * torch.where(decided, softplus(margins), 0.0)
        return Worth(soft, target.error(view.guarded))

    def _margins(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        """The soft margin of each image, the most alarming one over all decisions, and whether there was any."""
        device = self.generator.pipe._execution_device
        margins, decided = torch.full((count,), -torch.inf, device=device), torch.zeros(count, dtype=torch.bool)
        for index, (images, found) in enumerate(view.margins):
            if not images:
                continue
            scale = self.scales.setdefault(index, max(float(found.detach().abs().median()), 1e-6))
            soft = torch.asinh(STEEP * found.float() / scale)
            own = torch.full_like(margins, -torch.inf).index_put((torch.tensor(images),), soft)
            margins, decided = torch.maximum(margins, own), decided.index_fill(0, torch.tensor(images), True)
        return torch.where(decided, margins, 0.0), decided.to(margins.device)


def _alike(first: View, second: View) -> bool:
    """Whether two looks at the same prompts saw the same."""
    assert first.guarded is not None
    assert second.guarded is not None
    margins = [torch.cat([found for _, found in view.margins]) if view.margins else torch.zeros(0) for view in (first, second)]
    return torch.equal(first.guarded, second.guarded) and torch.equal(*margins)
