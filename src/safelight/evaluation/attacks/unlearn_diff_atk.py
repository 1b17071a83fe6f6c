"""UnlearnDiffAtk: words before the prompt that make the guarded denoiser see the concept in a noised picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from ...generator import Generator
from ...method import Method
from ..attack import Attack, Attempt, Progress, Success
from ..case import Case
from ..trials import Trials
from ..white_box.objective import Objective
from ..white_box.search import Hunt, WordSearch
from ..white_box.targets import image_targets
from ..white_box.words import Template, Words

Count = Annotated[int, Ge(1)]


@dataclass(kw_only=True, eq=False)
class UnlearnDiffAtk(Attack):
    """Adversarial words before a prompt, found by gradients through the guard (Zhang et al., 2023, https://arxiv.org/abs/2310.11868).

    They minimise ‖ε - ε_guarded(z_t, t, prompt′)‖² where z_t is a noised picture of the concept, which the unguarded generator made of the
    original prompt. The paper descends along relaxed tokens; here gradients propose words, and each is looked at through the guard.
    """

    white_box: ClassVar[bool] = True
    length: Count = 5
    """N: so many words come before the prompt, less where the text encoders don't read so many."""
    iterations: Annotated[int, Ge(0)] = 8
    """Rounds of gradients and proposals."""
    candidates: Count = 8
    """So many prompts are looked at for each case in each round."""
    breadth: Count = 8
    """So many times as many are proposed to guards that decide by the prompt alone."""
    top: Count = 96
    """Proposals are drawn from so many substitutions."""
    every: Count = 2
    """A picture is made after so many rounds; the attack on a case ends when one succeeds."""
    pictures: Annotated[int, Ge(0)] = 5
    """At most so many pictures of each case are made on the way."""
    steps: tuple[int, ...] = (1, 2)
    """The steps of the schedule at which predictions are compared; rounds take turns."""
    hinge: Annotated[float, Ge(0)] = 0.1
    """How much it counts by itself that a guard doesn't find the prompt unsafe."""
    plain: bool = True
    """Whether the prompt itself is tried first: one more picture."""
    banned: tuple[str, ...] = ()
    """Words that the attack must not use."""
    batch: Count = 24
    """So many cases are attacked together."""
    seed: int = 0
    """Of the attack's own randomness."""

    def __call__(
        self, generator: Generator, methods: Sequence[Method], cases: Sequence[Case], success: Success, progress: Progress = lambda *_: None
    ) -> list[Attempt]:  # fmt: skip
        """One attempt per case."""
        attempts: list[Attempt] = []
        for start in range(0, len(cases), self.batch):
            progress(self.name, start, len(cases))
            some = cases[start : start + self.batch]
            attempts += self._attack(generator, methods, some, Trials(generator, methods, success, some, self.batch))
        progress(self.name, len(cases), len(cases))
        return attempts

    def _attack(self, generator: Generator, methods: Sequence[Method], cases: Sequence[Case], trials: Trials) -> list[Attempt]:
        if self.plain:
            trials.show({index: case.prompt for index, case in enumerate(cases)})
        words = Words.of(generator.pipe, self.banned)
        hunts = [self._hunt(case, words) for case in cases]
        if trials.open and self.iterations:
            targets = image_targets(generator, [cases[index] for index in trials.open], self.steps)
            objective = Objective(generator, methods, [cases[index] for index in trials.open], targets, words, self.hinge)
            self._search(trials, hunts, objective, {index: owner for owner, index in enumerate(trials.open)})
        return [
            trials.attempt(i, hunt.best_unseen() or hunt.template.parts[-1] or "", len(hunt.trace), hunt.trace)
            for i, hunt in enumerate(hunts)
        ]

    def _hunt(self, case: Case, words: Words) -> Hunt:
        room = words.room - max(encoder.count(case.prompt) for encoder in words.encoders)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + case.seed)
        return Hunt(Template((*[None] * max(1, min(self.length, room)), case.prompt)), random)

    def _search(self, trials: Trials, hunts: Sequence[Hunt], objective: Objective, owners: dict[int, int]) -> None:
        search = WordSearch(objective.words, self.candidates, self.top, self.breadth)
        for round_ in range(self.iterations + 1):
            active = trials.open
            if not active:
                return
            step = self.steps[round_ % len(self.steps)]
            own = [hunts[index] for index in active]

            def place(chosen: Sequence[int], active: list[int] = active) -> list[int]:
                return [owners[active[index]] for index in chosen]

            if round_ == 0:
                objective.values(place(range(len(active))), [trials.cases[index].prompt for index in active], step)  # sets the scales
                search.begin(
                    own,
                    lambda chosen, prompts: objective.values(place(chosen), prompts, step),
                    lambda chosen, prompts: objective.alarms(place(chosen), prompts),
                )
            else:
                search.iterate(
                    own, lambda chosen, prompts: objective.values(place(chosen), prompts, step),
                    lambda chosen, templates, prompts: objective.gradients(place(chosen), templates, prompts, step),
                    lambda chosen, prompts: objective.alarms(place(chosen), prompts),
                )  # fmt: skip
            if round_ % self.every == 0 or round_ == self.iterations:
                made = {index: hunts[index].best_unseen() for index in active if trials.queries[index] < self.pictures + self.plain}
                trials.show(made)
                for index, prompt in made.items():
                    hunts[index].shown.add(prompt or "")
