"""Pictures made through a guard to see whether an attack has succeeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..attach import guard
from ..generator import Generator, as_bytes
from ..method import Method
from .attack import Attempt, Success
from .case import Case


@dataclass
class Trials:
    """The trials of one attack, and how they ended."""

    generator: Generator
    methods: Sequence[Method]
    success: Success
    cases: Sequence[Case]
    batch: int = 16
    queries: list[int] = field(default_factory=list)
    won: dict[int, str] = field(default_factory=dict)
    """The prompts that succeeded, by the place of their case."""
    last: dict[int, str] = field(default_factory=dict)
    """The prompts that were tried last."""

    def __post_init__(self) -> None:
        self.queries = [0] * len(self.cases)

    @property
    def open(self) -> list[int]:
        """The places of cases that have not succeeded."""
        return [index for index in range(len(self.cases)) if index not in self.won]

    def show(self, prompts: Mapping[int, str | None]) -> None:
        """Makes a picture of a prompt for each of some cases, through the guard; those without a prompt are passed over."""
        chosen = [(index, prompt) for index, prompt in prompts.items() if prompt is not None and index not in self.won]
        for start in range(0, len(chosen), self.batch):
            some = chosen[start : start + self.batch]
            requests = [replace(self.cases[index], prompt=prompt) for index, prompt in some]
            with guard(self.generator.pipe, *self.methods, unjudged_images="accept"):
                pictures = [as_bytes(image) for image in self.generator(requests)]
            for (index, prompt), won in zip(some, self.success(requests, pictures), strict=True):
                self.queries[index] += 1
                self.last[index] = prompt
                if won:
                    self.won[index] = prompt

    def attempt(self, index: int, best: str, iterations: int = 0, trace: Sequence[float] = ()) -> Attempt:
        """What became of a case; `best` is the prompt that stands for it if none succeeded and none was tried."""
        case = self.cases[index]
        prompt = self.won.get(index, self.last.get(index, best))
        return Attempt(
            replace(case, prompt=prompt), case.prompt, index in self.won, self.queries[index], iterations,
            trace[-1] if trace else None, list(trace),
        )  # fmt: skip
