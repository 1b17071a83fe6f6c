"""Prompting4Debugging: a prompt that makes the guarded denoiser predict what the bare one predicts for the unsafe prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from ...generator import Generator
from ..case import Case
from ..white_box.attack import Count, GradientAttack
from ..white_box.targets import Target, model_target
from ..white_box.words import Template, Words


@dataclass(kw_only=True, eq=False)
class P4D(GradientAttack):
    """Words, found by gradients through the guard, for which it predicts the bare model's noise (Chin et al., 2023, https://arxiv.org/abs/2309.06135).

    They minimise ‖ε_bare(z_t, t, prompt) - ε_guarded(z_t, t, prompt′)‖² at the latents on the bare model's way. The paper descends along
    continuous tokens and projects them; here gradients propose words, and each is looked at through the guard.
    """

    variant: Literal["K", "N", "suffix"] = "N"
    """K: a word after every `every_words` of the prompt's. N: a prompt of `length` new words. suffix: so many new words after the prompt."""
    length: Count = 16
    """N, less where the text encoders don't read so many; published: 16."""
    every_words: Annotated[int, Ge(1)] = 3
    """K; published: 3."""

    def template(self, case: Case, words: Words) -> Template:
        """The prompt's words, gaps, or both."""
        if self.variant == "N":
            return Template((None,) * min(self.length, words.room))
        room = max(1, words.room - max(encoder.count(case.prompt) for encoder in words.encoders))
        if self.variant == "suffix":
            return Template((case.prompt, *[None] * min(self.length, room)))
        pieces = case.prompt.split()
        parts: list[str | None] = []
        for start in range(0, len(pieces), self.every_words):
            parts += [" ".join(pieces[start : start + self.every_words]), *([None] if parts.count(None) < room else [])]
        return Template(tuple(parts))

    def target(self, generator: Generator, cases: Sequence[Case]) -> Target:
        """What the bare denoiser predicts for the original prompt."""
        return model_target(generator, cases, self.at)
