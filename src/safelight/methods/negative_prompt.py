"""The negative prompt, as a baseline: what every user tries first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import MinLen
from torch import Tensor

from ..flow import Call, Step, put
from ..method import Method
from ..run import Run


@dataclass(kw_only=True, eq=False)
class NegativePrompt(Method):
    """Guides every picture away from words, as a negative prompt does (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598).

    The unconditional prediction of guidance is replaced by one for `words`, so that guidance points away from them. It acts on every
    sample, benign ones too; `Gate` confines it to flagged ones.
    """

    words: Annotated[str, MinLen(1)]
    """What should not be in the picture."""

    def begin(self) -> None:
        """Encodes the words."""
        self.embedding = self.run.encode(self.words)
        self.acted = False

    def meet(self, further: Run) -> None:
        """It guides away from its own words, whatever the prompt."""

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Puts the words where the pipeline has its own negative prompt."""
        rows = slice(0, call.cond.start) if call.conditional else slice(0, len(call.text))
        if rows.start == rows.stop:
            return denoise(call)
        self.acted = True
        for image in range(self.run.images):
            self.note(image, action="guided away")
        text = put(call.text, rows, self.embedding.text.to(call.text))
        pooled = call.pooled
        if pooled is not None and self.embedding.pooled is not None:
            pooled = put(pooled, rows, self.embedding.pooled.to(pooled))
        return denoise(replace(call, text=text, pooled=pooled))

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        """Makes sure that guidance is on.

        Raises:
            ValueError: if it is not, so that the negative prompt has no effect.
        """
        if not self.acted:
            raise ValueError(
                "a negative prompt needs classifier-free guidance: pass guidance_scale > 1, or for FLUX true_cfg_scale > 1 and "
                "negative_prompt=''"
            )
        self.acted = False
        return advance(step)
