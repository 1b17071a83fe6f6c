"""Gives any method a detector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..backbone import Backbone
from ..detector import Detector
from ..flow import Call, Embedding, Heads, Step, put
from ..method import Method
from ..run import Run
from ..site import Site


@dataclass(kw_only=True, eq=False)
class Gate(Method):
    """Confines a method to the samples that a detector flags; all others are bit-identical to the unguarded pipeline.

    Gating by nearest neighbours follows Vice et al. (2024, https://arxiv.org/abs/2411.13982), where only detected prompts are changed.
    The method sees the whole batch, but rows that are not flagged reach the denoiser, and leave it, as they were.
    """

    detector: Detector[str] = field(metadata={"artefact": "bank"})
    """Tells which prompts are unsafe."""
    method: Method = field(metadata={"artefact": "method"})
    """What is done about them."""

    def begin(self) -> None:
        """Judges the prompts and begins the method."""
        verdicts = self.run.judge(self.detector)
        self.inner = copy(self.method)
        self.flagged = [image for image, verdict in enumerate(verdicts) if verdict.flagged]
        self.inner.run, self.inner.position, self.inner.confined_to = self.run, self.position, self.flagged
        self.inner.begin()
        for image, verdict in enumerate(verdicts):
            self.note_verdict(image, verdict)

    def meet(self, further: Run) -> None:
        """Judges prompts that come late."""
        further.refuse_unsafe(self.detector, self.name)

    def owed(self) -> Iterable[int]:
        """Flagged images, and those of them on which the method itself must act."""
        return {*super().owed(), *self.inner.owed()} if self.flagged else ()

    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        """The method's prompts, for flagged samples only."""
        if not self.flagged:
            return encode(prompts)
        copies = max(1, self.run.images // max(1, len(prompts)))
        kept = set(range(len(prompts))) - {image // copies for image in self.flagged}

        def gated(new: list[str]) -> Embedding:
            self._acted_if(any(text is not prompts[i] for i, text in enumerate(new)))
            return encode([prompts[i] if i in kept else text for i, text in enumerate(new)])

        return self.inner.encode(prompts, gated)

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """The method's prediction, in the rows of flagged samples only."""
        if not self.flagged:
            return denoise(call)
        first: list[Tensor] = []
        rows = self._rows(call)

        def gated(changed: Call) -> Tensor:
            if len(changed.text) != len(call.text):  # an extra branch of the method's own
                return denoise(changed)
            self._acted_if(changed is not call)
            noise = denoise(_only(rows, call, changed))
            first.append(noise)
            return noise

        noise = self.inner.denoise(call, gated)
        self._acted_if(not first or noise is not first[0])
        return noise if first and noise is first[0] else put(first[0] if first else denoise(call), rows, noise[rows])

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """The method's sites."""
        return self.method.sites(backbone)

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        """The method's edit, for flagged samples only."""
        own = self._own()
        edited = self.inner.edit(site, tokens) if own else tokens
        self._acted_if(edited is not tokens)
        return tokens if edited is tokens else put(tokens, own, edited[own])

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        """The method's attention, for flagged samples only."""
        own = self._own()
        if not own:
            return attend(heads)
        plain = attend(heads)
        attended = self.inner.attend(site, heads, lambda changed: plain if changed is heads else attend(changed))
        self._acted_if(attended is not plain)
        return put(plain, own, attended[own])

    @property
    def attends(self) -> bool:
        """Whether the method's attention is wanted for a flagged sample."""
        return bool(self.flagged) and self.inner.attends

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        """The method's step, for flagged samples only."""
        if not self.flagged:
            return advance(step)
        first: list[Tensor] = []

        def gated(changed: Step) -> Tensor:
            self._acted_if(changed is not step)
            latents = advance(
                replace(
                    changed,
                    noise=put(step.noise, self.flagged, changed.noise[self.flagged]),
                    latents=put(step.latents, self.flagged, changed.latents[self.flagged]),
                )
            )
            first.append(latents)
            return latents

        latents = self.inner.step(step, gated)
        self._acted_if(not first or latents is not first[0])
        return put(first[0] if first else latents, self.flagged, latents[self.flagged])

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        """The method's pictures, for flagged samples only."""
        if not self.flagged:
            return decode(images)

        def gated(changed: Tensor) -> Any:
            self._acted_if(changed is not images)
            return decode(put(images, self.flagged, changed[self.flagged]))

        return self.inner.decode(images, gated)

    def _acted_if(self, changed: bool) -> None:
        """The method did something to the flagged samples, which it need not have noted itself."""
        for image in self.flagged if changed and not self.run.preview else ():
            self.run.note_acted(self.position, image)

    def _own(self) -> list[int]:
        assert self.run.call is not None
        return [row for row, image in enumerate(self.run.call.samples) if image in set(self.flagged)]

    def _rows(self, call: Call) -> list[int]:
        """The rows of flagged samples in all halves of a call."""
        images = self.run.images
        return [start + image for start in range(0, len(call.text), images) for image in self.flagged]


def _only(rows: list[int], call: Call, changed: Call) -> Call:
    """`changed` in some rows, `call` in all others."""
    pooled = changed.pooled
    if pooled is not None and call.pooled is not None:
        pooled = put(call.pooled, rows, pooled[rows])
    return replace(
        changed, latents=put(call.latents, rows, changed.latents[rows]), text=put(call.text, rows, changed.text[rows]), pooled=pooled
    )  # fmt: skip
