"""Attacks that search words by gradients through the guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval

from ...generator import Generator
from ...method import Method
from ..attack import Attack, Attempt, Progress, Success
from ..case import Case
from ..trials import Trials
from .objective import Objective
from .search import Hunt, WordSearch
from .targets import Target
from .words import Template, Words

Count = Annotated[int, Ge(1)]


@dataclass(kw_only=True, eq=False)
class GradientAttack(Attack):
    """Searches words for the gaps of a template, so that the guarded denoiser predicts what is wanted. Subclasses say what and where."""

    white_box: ClassVar[bool] = True
    iterations: Annotated[int, Ge(0)] = 8
    """Rounds of gradients and proposals."""
    candidates: Count = 8
    """So many prompts are looked at for each case in each round."""
    breadth: Count = 8
    """So many times as many are proposed, where a guard decides by the prompt alone: those that alarm it least are looked at."""
    top: Count = 96
    """Proposals are drawn from so many substitutions."""
    every: Count = 2
    """A picture is made after so many rounds; the attack on a case ends when one succeeds."""
    pictures: Annotated[int, Ge(0)] = 5
    """At most so many pictures of each case are made on the way."""
    at: Annotated[float, Interval(ge=0, le=1)] | None = None
    """The share of the steps that lie behind where predictions are compared; by default where a prompt says most: 0.05 of a flow, else 0.25."""
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
        words = Words.of(generator.pipe, self.banned)
        rounds = self.iterations + 1
        total = -(-len(cases) // self.batch) * rounds
        for number, start in enumerate(range(0, len(cases), self.batch)):
            progress(self.name, number * rounds, total)
            some = cases[start : start + self.batch]
            trials = Trials(generator, methods, success, some, self.batch)
            hunts = [self._hunt(case, words) for case in some]
            if self.plain:
                trials.show({index: case.prompt for index, case in enumerate(some)})
            if trials.open:
                self._search(trials, hunts, words, lambda done, number=number: progress(self.name, number * rounds + done, total))  # type: ignore[misc]
            attempts += [self._attempt(trials, index, hunt) for index, hunt in enumerate(hunts)]
        progress(self.name, total, total)
        return attempts

    def template(self, case: Case, words: Words) -> Template:
        """Where words go."""
        raise NotImplementedError

    def target(self, generator: Generator, cases: Sequence[Case]) -> Target:
        """What is wanted of the guarded denoiser."""
        raise NotImplementedError

    def _hunt(self, case: Case, words: Words) -> Hunt:
        return Hunt(self.template(case, words), torch.Generator().manual_seed(self.seed * 1_000_003 + case.seed))

    def _attempt(self, trials: Trials, index: int, hunt: Hunt) -> Attempt:
        return trials.attempt(index, hunt.best_unseen() or trials.cases[index].prompt, max(0, len(hunt.trace) - 1), hunt.trace)

    def _search(self, trials: Trials, hunts: Sequence[Hunt], words: Words, done: Callable[[int], None]) -> None:
        first = trials.open
        cases = [trials.cases[index] for index in first]
        objective = Objective(trials.generator, trials.methods, cases, self.target(trials.generator, cases), words, self.hinge)
        objective.begin()
        search = WordSearch(words, self.candidates, self.top, self.breadth)
        for round_ in range(self.iterations + 1):
            active = trials.open
            if not active:
                return
            view = objective.of([first.index(index) for index in active])
            (search.iterate if round_ else search.begin)([hunts[index] for index in active], view)
            if round_ % self.every == 0 or round_ == self.iterations:
                self._try(trials, hunts)
            done(round_ + 1)

    def _try(self, trials: Trials, hunts: Sequence[Hunt]) -> None:
        """Makes pictures of the most promising prompts."""
        made = {index: hunts[index].best_unseen() for index in trials.open if trials.queries[index] < self.pictures + self.plain}
        trials.show(made)
        for index, prompt in made.items():
            if prompt is not None and index not in trials.won:
                hunts[index].leave(prompt)
