"""Safe latent diffusion, as a baseline: guidance away from a concept, where the picture moves towards it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Interval, MinLen
from torch import Tensor

from ..flow import Call, Embedding, put
from ..method import Method
from ..run import Run

Share = Annotated[float, Interval(ge=0, le=1)]


class _Preset(NamedTuple):
    warmup: float
    scale: float
    threshold: float
    momentum: float
    beta: float


PRESETS = {
    "weak": _Preset(0.3, 20, 0.0, 0.0, 0.0),
    "medium": _Preset(0.2, 1000, 0.01, 0.3, 0.4),
    "strong": _Preset(0.14, 2000, 0.025, 0.5, 0.7),
    "max": _Preset(0.0, 5000, 1.0, 0.5, 0.7),
}
"""The paper's four, whose warm-up of 15, 10, 7 and 0 steps is a share of its 50."""


@dataclass(kw_only=True, eq=False)
class SLD(Method):
    """Subtracts safety guidance, the direction of a concept where the prediction is near it, from the prompt's prediction.

    Safe Latent Diffusion (Schramowski et al., 2023, https://arxiv.org/abs/2211.05105), equations 3 to 8. With batched guidance the
    pipeline's own guidance then gives exactly the paper's formula. Where there is none (FLUX's distilled guidance), the prediction for an
    empty prompt takes the unconditional one's place. It acts on every sample; `Gate` confines it to flagged ones.
    """

    concept: Annotated[str, MinLen(1)]
    """What should not be in the picture, in words."""
    scale: Annotated[float, Ge(0)] = PRESETS["medium"].scale
    """s_S: how strongly differences count."""
    warmup: Share = PRESETS["medium"].warmup
    """δ: this share of the steps, the first ones, is not changed; published: 10 of 50 steps."""
    threshold: float = PRESETS["medium"].threshold
    """λ: an entry is changed where the prompt's prediction exceeds the concept's by less."""
    momentum: Share = PRESETS["medium"].momentum
    """s_m: how much of the earlier steps' guidance is added."""
    beta: Share = PRESETS["medium"].beta
    """β_m: how much of the momentum is kept from step to step."""

    @classmethod
    def preset(cls, name: Literal["weak", "medium", "strong", "max"], concept: str) -> SLD:
        """One of the paper's four settings."""
        return cls(concept=concept, **PRESETS[name]._asdict())

    def begin(self) -> None:
        """Encodes the concept, and the empty prompt."""
        self.embedding, self.empty = self.run.encode(self.concept), self.run.encode("")
        self.past: dict[int, Tensor] = {}

    def meet(self, further: Run) -> None:
        """It guides away from its concept, whatever the prompt."""

    def owed(self) -> Iterable[int]:
        """Every image that it isn't kept from."""
        return [image for image in range(self.run.images) if self.scale and (self.confined_to is None or image in self.confined_to)]

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Changes the conditional rows' predictions."""
        noise = denoise(call)
        if not call.conditional or not self.scale:
            return noise
        chosen = [place for place, image in enumerate(call.samples) if self.confined_to is None or image in self.confined_to]
        if not chosen:
            return noise
        own = call.take(chosen, conditional=True)
        concept = denoise(self._with(own, self.embedding))
        rows = torch.tensor([call.cond.start + place for place in chosen], device=noise.device)
        plain = noise[rows - call.cond.start] if call.cond.start else denoise(self._with(own, self.empty))
        images = [call.samples[place] for place in chosen]
        guidance = self._guidance(images, noise[rows], concept, plain)
        first = round(self.warmup * self.run.total)
        if self.run.index < first:
            return noise
        for image in images:
            self.note(image, action="guided away", steps=(first, self.run.total), strength=self.scale)
        return put(noise, rows, noise[rows] - guidance)

    def _guidance(self, images: list[int], prompt: Tensor, concept: Tensor, plain: Tensor) -> Tensor:
        """Equations 5 to 8, for predictions of the prompt, the concept, and neither."""
        difference = prompt - concept
        factor = (difference.abs() * self.scale).clamp(max=1.0) * (difference < self.threshold)
        past = torch.stack([self.past[image] if image in self.past else torch.zeros_like(prompt[0]) for image in images])
        guidance = factor * (concept - plain) + self.momentum * past
        past = self.beta * past + (1 - self.beta) * guidance
        self.past |= dict(zip(images, past, strict=True))
        return guidance

    def _with(self, call: Call, embedding: Embedding) -> Call:
        count = len(call.samples)
        text = embedding.text.to(call.text).expand(count, *embedding.text.shape[1:])
        pooled = None if embedding.pooled is None else embedding.pooled.expand(count, -1)
        return call.with_text(text, pooled)
