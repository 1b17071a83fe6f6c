"""SafeRedir: a generation that is on its way to an unsafe picture gets another prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from ..backbone import Backbone
from ..errors import ArtefactError
from ..flow import Call
from ..method import Method
from ..nets.redirector import Reading, redirect
from ..redirector import Redirector
from ..site import Site

Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass
class _Sample:
    """What is remembered of one prompt of one image."""

    text: Tensor
    """The prompt as it was given, [tokens, width]."""
    pooled: Tensor | None
    redirected: Tensor
    """p̂, [tokens, width]."""
    redirected_pooled: Tensor | None
    wait: int
    """Steps until it is looked at again."""


@dataclass(kw_only=True, eq=False)
class SafeRedir(Method):
    """Redirects the prompt's embedding, token by token, while latents, timestep and prompt together look unsafe.

    SafeRedir (Liu et al., 2026, https://arxiv.org/abs/2601.08623). Before a denoiser call a small network reads latents z, prompt p and
    timestep t. If it finds them unsafe, p̂ = p + s · α · m ⊙ Δ/‖Δ‖ ⊙ ‖p‖ (per token) replaces p, and the next K steps are not checked.
    """

    redirectors: tuple[Redirector, ...] = field(metadata={"artefact": "redirectors"})
    """One network per concept; from `safelight train saferedir`."""
    threshold: Share | None = None
    """The probability above which a generation is redirected; by default each redirector's own."""
    hold: Share = 0.5
    """For a prompt that was redirected before, the threshold times this: who was led away once is more easily led again."""
    alpha_scale: Annotated[float, Interval(ge=0, le=4)] = 1.25
    """s: how far tokens are moved, in units of their norm."""
    cooldown: Annotated[int, Ge(0)] = 2
    """K: so many steps after a redirection are not checked."""
    masked: bool = True
    """Whether the mask m scales what each token is moved by (published code: no, it cancels)."""
    adaptive: bool = True
    """Whether α does; without, tokens are moved by s (times m)."""
    late: bool = False
    """Check after the denoiser call, so that the first step is unprotected (published code)."""
    unconditional: bool = False
    """Move the unconditional rows too (published code)."""

    @classmethod
    def published(cls, redirectors: Sequence[Redirector]) -> SafeRedir:
        """The behaviour of the released code; also use it with redirectors of the `official` architecture."""
        return cls(redirectors=tuple(redirectors), threshold=0.5, hold=1.0, alpha_scale=1.5, masked=False, late=True, unconditional=True)

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """None; but each redirector must fit the denoiser.

        Raises:
            ArtefactError: if there are none, or one was trained for another model.
        """
        if not self.redirectors:
            raise ArtefactError("saferedir has no redirector; train one with `safelight train saferedir`")
        for redirector in self.redirectors:
            redirector.check(backbone)
        return ()

    def begin(self) -> None:
        """Nothing is known yet."""
        self.samples: dict[int, list[_Sample]] = {}
        self.margins: dict[int, float] = {}
        self.calls = 0
        """How often a network was asked."""

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Checks the conditional rows, and calls the denoiser with the redirected prompts."""
        if not call.conditional or not self.alpha_scale:
            return denoise(call)
        states = [self._known(call, row, image) for row, image in enumerate(call.samples)]
        if not self.late:
            self._check(call, states)
        noise = denoise(self._redirected(call, states))
        if self.late:
            self._check(call, states)
        return noise

    def _known(self, call: Call, row: int, image: int) -> _Sample | None:
        """What is remembered of a row: other methods may send an image through with more than one prompt."""
        text = call.text[call.cond][row]
        return next((state for state in self.samples.get(image, ()) if torch.equal(state.text, text)), None)

    def _check(self, call: Call, states: list[_Sample | None]) -> None:
        """Asks the networks about every row that is due, and redirects those that look unsafe."""
        due = []
        for row, (image, state) in enumerate(zip(call.samples, states, strict=True)):
            if self.confined_to is not None and image not in self.confined_to:
                continue
            if state is not None and state.wait:
                state.wait -= 1
            else:
                due.append(row)
        if not due:
            return
        given = self._inputs(call, due, [states[row] for row in due])
        readings = [self._read(call, redirector, given, len(due)) for redirector in self.redirectors]
        risks = torch.stack([reading.unsafe[: len(due)] for reading in readings]).T.tolist()  # the step's one wait for the device
        for place, row in enumerate(due):
            fired = self._fired(risks[place], known=states[row] is not None)
            self._note_risk(call.samples[row], risks[place], fired)
            if fired:
                again = [r for r in due if states[r] is not None]
                own = len(due) + again.index(row) if states[row] is not None else place
                states[row] = self._redirect(call, row, states[row], [readings[index].take(slice(own, own + 1)) for index in fired])

    def _inputs(self, call: Call, due: list[int], states: list[_Sample | None]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the networks read: rows that are due, with the prompt in use; then, for the redirected ones, with their own prompt again.

        Whether they are still unsafe is judged by p̂, where they should go by p; both are read in one go.
        """
        text, pooled = call.text[call.cond], None if call.pooled is None else call.pooled[call.cond]
        again = [row for row, state in zip(due, states, strict=True) if state is not None]
        rows = due + again
        maps = self.run.backbone.grid(call.latents[call.cond], call.layout)[rows]
        times = call.timestep.expand(len(call.latents))[call.cond][rows] if call.timestep.ndim else call.timestep.expand(len(rows))
        texts, pools = text[rows].clone(), None if pooled is None else pooled[rows].clone()
        for place, state in enumerate(states):
            if state is not None:
                texts[place] = state.redirected
                if pools is not None and state.redirected_pooled is not None:
                    pools[place] = state.redirected_pooled
        return maps, texts, times, pools

    def _read(self, call: Call, redirector: Redirector, given: tuple[Tensor, Tensor, Tensor, Tensor | None], due: int) -> Reading:
        redirector.check_call(call, given[0])
        self.calls += 1
        return redirector.at(call.latents.device).read(*given)

    def _fired(self, risks: list[float], *, known: bool) -> list[int]:
        """The concepts found in a row, the surest first."""
        share = self.hold if known else 1.0
        found = [index for index, risk in enumerate(risks) if not risk <= share * self._limit(index)]  # NaN is found too
        return sorted(found, key=lambda index: -risks[index])

    def _redirect(self, call: Call, row: int, state: _Sample | None, readings: list[Reading]) -> _Sample:
        """p̂ of one row, from the original prompt: what one concept takes of a token's way is not left for the next."""
        image = call.samples[row]
        text = call.text[call.cond][row]
        pooled = None if call.pooled is None else call.pooled[call.cond][row]
        moved, moved_pooled = text, pooled
        used = torch.zeros_like(text[:, :1])
        used_pooled = torch.zeros_like(text[0, :1])
        for reading in readings:
            strength = self._strength(reading)[0].to(text) * (1 - used)
            moved = moved + (redirect(text, reading.delta[0].to(text), self.alpha_scale * strength) - text)
            used = used + strength
            if pooled is not None and moved_pooled is not None and reading.pooled is not None:
                direction, distance = (part[0].to(pooled) for part in reading.pooled)
                share = (distance if self.adaptive else torch.ones_like(distance)) * (1 - used_pooled)
                moved_pooled = moved_pooled + (redirect(pooled, direction, self.alpha_scale * share) - pooled)
                used_pooled = used_pooled + share
        if state is None:
            state = _Sample(text.clone(), pooled, moved, moved_pooled, self.cooldown)
            self.samples.setdefault(image, []).append(state)
        else:
            state.redirected, state.redirected_pooled, state.wait = moved, moved_pooled, self.cooldown
        self._note_action(image, float((self.alpha_scale * used).max()))
        return state

    def _strength(self, reading: Reading) -> Tensor:
        """α m, as far as they are in use, [rows, tokens, 1]."""
        strength = reading.alpha if self.adaptive else torch.ones_like(reading.alpha)
        return strength * reading.mask[..., None] if self.masked else strength

    def _redirected(self, call: Call, states: list[_Sample | None]) -> Call:
        """The call with p̂ where there is one; the call itself where there is none."""
        chosen = [(row, state) for row, state in enumerate(states) if state is not None]
        if not chosen:
            return call
        text = call.text.clone()
        pooled = None if call.pooled is None else call.pooled.clone()
        for row, state in chosen:
            places = [call.cond.start + row]
            text[places[0]] = state.redirected
            if pooled is not None and state.redirected_pooled is not None:
                pooled[places[0]] = state.redirected_pooled
            if self.unconditional and call.cond.start:
                own = call.text[row]
                scale = own.norm(dim=-1, keepdim=True) / state.text.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                text[row] = own + (state.redirected - state.text) * scale
        return replace(call, text=text, pooled=pooled)

    def _limit(self, index: int) -> float:
        """The probability above which a concept is found."""
        return self.redirectors[index].threshold if self.threshold is None else self.threshold

    def _note_risk(self, image: int, risks: list[float], fired: list[int]) -> None:
        """Fills in the highest risk until the first redirection, relative to its limit."""
        best = fired[0] if fired else max(range(len(risks)), key=lambda index: risks[index] - self._limit(index))
        margin = risks[best] - self._limit(best)
        if image in self.samples or margin <= self.margins.get(image, -1.0):
            return
        self.margins[image] = margin
        concept = self.redirectors[best].concept if fired else None
        self.note(image, flagged=bool(fired), concept=concept, score=risks[best], threshold=self._limit(best))

    def _note_action(self, image: int, strength: float) -> None:
        """Fills in when and how far the prompt was redirected; until the end, since p̂ stays in use."""
        action = self.run.action(self.position, image, self.name)
        first = self.run.index + int(self.late)
        steps = (action.steps[0] if action.steps else first, self.run.total)
        self.note(image, action="redirected", steps=steps, strength=max(strength, action.strength or 0.0))
        self.run.record("redirected", image=image, strength=round(strength, 4))
