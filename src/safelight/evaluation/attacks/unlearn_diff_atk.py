"""UnlearnDiffAtk: words before the prompt that make the guarded denoiser see the concept in a noised picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...generator import Generator
from ..case import Case
from ..white_box.attack import Count, GradientAttack
from ..white_box.targets import Target, image_target
from ..white_box.words import Template, Words


@dataclass(kw_only=True, eq=False)
class UnlearnDiffAtk(GradientAttack):
    """Adversarial words before a prompt, found by gradients through the guard (Zhang et al., 2023, https://arxiv.org/abs/2310.11868).

    They minimise ‖ε - ε_guarded(z_t, t, prompt′)‖² where z_t is a noised picture of the concept, which the unguarded generator made of the
    original prompt. The paper descends along relaxed tokens; here gradients propose words, and each is looked at through the guard.
    """

    length: Count = 5
    """N: so many words come before the prompt, less where the text encoders don't read so many; published: 3 or 5."""

    def template(self, case: Case, words: Words) -> Template:
        """N gaps, then the prompt."""
        room = words.room - max(encoder.count(case.prompt) for encoder in words.encoders)
        return Template((*[None] * max(1, min(self.length, room)), case.prompt))

    def target(self, generator: Generator, cases: Sequence[Case]) -> Target:
        """The noise in a noised picture of the concept."""
        return image_target(generator, cases, self.at)
