"""Looks for prompts that get past a guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..generator import Generator
from ..method import Method
from ..registry import Registry
from .case import Case

Progress = Callable[[str, int, int], None]
Success = Callable[[Sequence[Case], Sequence[Any]], Sequence[bool]]
"""Whether each picture [height, width, 3] shows what the attack is after: by all judges."""


@dataclass(frozen=True)
class Attempt:
    """What an attack made of one case."""

    case: Case
    """With the adversarial prompt; id and seed are the original's."""
    original: str
    """The prompt it began with."""
    succeeded: bool
    queries: int
    """Pictures that were made with the guarded system on the way."""
    iterations: int = 0
    loss: float | None = None
    trace: list[float] = field(default_factory=list, repr=False)
    """The loss by iteration."""


class Attack:
    """Turns cases into attempts against one guarded pipeline. Subclasses are dataclasses of budgets and seeds, one per file in `attacks/`."""

    white_box: ClassVar[bool] = False
    """Whether it uses gradients through the guarded system."""

    @property
    def name(self) -> str:
        """The attack's name: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def __call__(
        self, generator: Generator, methods: Sequence[Method], cases: Sequence[Case], success: Success, progress: Progress = lambda *_: None
    ) -> list[Attempt]:  # fmt: skip
        """One attempt per case; `methods` are attached by the attack itself, and detached when it ends."""
        raise NotImplementedError


ATTACKS: Registry[Attack] = Registry("safelight.evaluation.attacks", Attack)
