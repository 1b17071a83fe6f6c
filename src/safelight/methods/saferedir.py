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
from ..nets.redirector import Aim, Judgement, redirect
from ..redirector import Redirector
from ..run import Run
from ..site import Site

Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass
class _Prompt:
    """What is remembered of one prompt of one image."""

    text: Tensor
    """As it was given, [tokens, width]."""
    pooled: Tensor | None
    moved: tuple[Tensor, Tensor | None] | None = None
    """p̂ and its pooled companion, once it has been redirected."""
    wait: int = 0
    """Steps until it is looked at again."""


@dataclass(kw_only=True, eq=False)
class SafeRedir(Method):
    """Redirects the prompt's embedding, token by token, while latents, timestep and prompt together look unsafe.

    Our variant of SafeRedir (Liu et al., 2026, https://arxiv.org/abs/2601.08623). Before a denoiser call a small network reads latents z, prompt p and
    timestep t. If it finds them unsafe, p̂ = p + s · α · m/max(m) ⊙ Δ/‖Δ‖ ⊙ ‖p‖ (per token) replaces p, and the next K steps are not checked.
    """

    redirectors: tuple[Redirector, ...] = field(metadata={"artefact": "redirectors"})
    """One network per concept; from `safelight train saferedir`."""
    threshold: Share | None = None
    """The probability above which a generation is redirected; by default each redirector's own."""
    hold: Share = 0.5
    """For a prompt that was redirected before, the threshold times this: who was led away once is more easily led again."""
    alpha_scale: Annotated[float, Interval(ge=0, le=4)] = 2.0
    """s: how far tokens are moved, in units of their norm."""
    cooldown: Annotated[int, Ge(0)] = 2
    """K: so many steps after a redirection are not checked."""
    interval: Annotated[int, Ge(1)] = 3
    """A sample that looks safe is looked at again after so many steps (published: 1)."""
    masked: bool = True
    """Whether the mask m scales what each token is moved by, relative to the token that carries most (published code: no, it cancels)."""
    adaptive: bool = True
    """Whether α does; without, tokens are moved by s (times m)."""
    late: bool = False
    """Check after the denoiser call, so that the first step is unprotected (published code)."""
    unconditional: bool = False
    """Move the unconditional rows too (published code)."""

    @classmethod
    def near_published(cls, redirectors: Sequence[Redirector]) -> SafeRedir:
        """The nearest that this class comes to the released code; also use it with redirectors of the `official` architecture.

        It differs from the second redirection on: the released code aims from the redirected embedding p̂, this one from the prompt's own p.
        """
        return cls(
            redirectors=tuple(redirectors),
            threshold=0.5,
            hold=1.0,
            interval=1,
            alpha_scale=1.5,
            masked=False,
            late=True,
            unconditional=True,
        )

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

    def meet(self, further: Run) -> None:
        """It looks at embeddings as they come."""

    def begin(self) -> None:
        """Nothing is known yet."""
        self.known: dict[int, list[_Prompt]] = {}
        self.latest: tuple[Call, int | None, list[_Prompt]] | None = None
        self.margins: dict[int, float] = {}
        self.calls = 0
        """How often a network was asked."""

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Checks the conditional rows, and calls the denoiser with the redirected prompts."""
        if not call.conditional or not self.alpha_scale:
            return denoise(call)
        prompts = self._recall(call)
        if not self.late:
            self._check(call, prompts)
        noise = denoise(self._redirected(call, prompts))
        if self.late:
            self._check(call, prompts)
        return noise

    def _recall(self, call: Call) -> list[_Prompt]:
        """What is remembered of each row's prompt; other methods may send an image through with more than one."""
        if self.latest is not None:
            before, version, prompts = self.latest
            if before.text is call.text and before.samples == call.samples and version is not None and version == _version(call.text):
                return prompts  # the usual case, without a look at the numbers
        text, pooled = call.text[call.cond], None if call.pooled is None else call.pooled[call.cond]
        prompts = []
        for row, image in enumerate(call.samples):
            known = self.known.setdefault(image, [])
            found = next((prompt for prompt in known if torch.equal(prompt.text, text[row])), None)
            if found is None:
                found = _Prompt(text[row].clone(), None if pooled is None else pooled[row].clone())
                known.append(found)
            prompts.append(found)
        self.latest = call, _version(call.text), prompts
        return prompts

    def _check(self, call: Call, prompts: list[_Prompt]) -> None:
        """Asks the networks about every row that is due, and redirects those that look unsafe."""
        due = []
        for row, (image, prompt) in enumerate(zip(call.samples, prompts, strict=True)):
            if self.confined_to is None or image in self.confined_to:
                if not prompt.wait:
                    due.append(row)
                prompt.wait = max(0, prompt.wait - 1)
        if not due:
            return
        again = [row for row in due if prompts[row].moved is not None]
        given = self._inputs(call, due, again, prompts)
        judged = [self._judge(call, redirector, given) for redirector in self.redirectors]
        if self.run.margins is not None:
            self._weigh([call.samples[row] for row in due], judged, [row in again for row in due])
        risks = torch.stack([judgement.unsafe[: len(due)] for judgement in judged]).T.tolist()  # the step's one wait for the device
        fired = [self._fired(risks[place], again=row in again) for place, row in enumerate(due)]
        own = [len(due) + again.index(row) if row in again else place for place, row in enumerate(due)]
        aims = self._aims(judged, dict(zip(own, fired, strict=True)))
        for place, row in enumerate(due):
            self._note_risk(call.samples[row], risks[place], fired[place])
            prompts[row].wait = self.cooldown if fired[place] else self.interval - 1
            if fired[place]:
                self._redirect(call.samples[row], prompts[row], [aims[own[place], concept] for concept in fired[place]])

    def _inputs(
        self, call: Call, due: list[int], again: list[int], prompts: list[_Prompt]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """What the networks read: rows that are due, with the prompt in use; then, for the redirected ones, with their own prompt again.

        Whether they are still unsafe is judged by p̂, where they should go by p; both are read in one go.
        """
        rows = due + again
        text, pooled = call.text[call.cond][rows], None if call.pooled is None else call.pooled[call.cond][rows]
        maps = self.run.backbone.grid(call.latents[call.cond], call.layout)[rows]
        times = call.timestep.expand(len(call.latents))[call.cond][rows]
        for place, row in enumerate(due):
            moved = prompts[row].moved
            if moved is not None:
                text[place] = moved[0]
                if pooled is not None and moved[1] is not None:
                    pooled[place] = moved[1]
        return maps, text, times, pooled

    def _judge(self, call: Call, redirector: Redirector, given: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Judgement:
        redirector.check_call(call, given[0])
        self.calls += 1
        return redirector.at(call.latents.device).judge(*given)

    def _aims(self, judged: list[Judgement], fired: dict[int, list[int]]) -> dict[tuple[int, int], Aim]:
        """(row of the judgement, concept) -> where that prompt should go."""
        aims: dict[tuple[int, int], Aim] = {}
        for concept, (redirector, judgement) in enumerate(zip(self.redirectors, judged, strict=True)):
            rows = [row for row, found in fired.items() if concept in found]
            if rows:
                aim = redirector.at(judgement.logits.device).aim(judgement, rows)
                aims |= {(row, concept): aim.take(slice(place, place + 1)) for place, row in enumerate(rows)}
        return aims

    def _fired(self, risks: list[float], *, again: bool) -> list[int]:
        """The concepts found in a row, the surest first."""
        share = self.hold if again else 1.0
        found = [index for index, risk in enumerate(risks) if not risk <= share * self._limit(index)]  # NaN is found too
        return sorted(found, key=lambda index: -risks[index])

    def _redirect(self, image: int, prompt: _Prompt, aims: list[Aim]) -> None:
        """Computes p̂ from the original prompt."""
        text, used = redirect(prompt.text, [(aim.delta[0], self._strength(aim)[0]) for aim in aims], self.alpha_scale)
        pooled = prompt.pooled
        if pooled is not None:
            ways = [(aim.pooled[0][0], aim.pooled[1][0] ** float(self.adaptive)) for aim in aims if aim.pooled is not None]
            pooled, _ = redirect(pooled, ways, self.alpha_scale)
        prompt.moved = text, pooled
        self._note_action(image, self.alpha_scale * float(used.detach().max()))

    def _strength(self, aim: Aim) -> Tensor:
        """α m / max m, as far as they are in use, [rows, tokens, 1].

        In a prompt that was found unsafe something carries the concept, however little the mask makes of a word it never saw.
        """
        strength = aim.alpha if self.adaptive else torch.ones_like(aim.alpha)
        return strength * (aim.mask / aim.mask.amax(-1, keepdim=True).clamp_min(1e-6))[..., None] if self.masked else strength

    def _redirected(self, call: Call, prompts: list[_Prompt]) -> Call:
        """The call with p̂ where there is one; the call itself where there is none."""
        chosen = [(row, prompt, prompt.moved) for row, prompt in enumerate(prompts) if prompt.moved is not None]
        if not chosen:
            return call
        text = call.text.clone()
        pooled = None if call.pooled is None else call.pooled.clone()
        for row, prompt, moved in chosen:
            text[call.cond.start + row] = moved[0]
            self.run.note_acted(self.position, call.samples[row])
            if pooled is not None and moved[1] is not None:
                pooled[call.cond.start + row] = moved[1]
            if self.unconditional and call.cond.start:
                own = call.text[row]
                scale = own.norm(dim=-1, keepdim=True) / prompt.text.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                text[row] = own + (moved[0] - prompt.text) * scale
        return replace(call, text=text, pooled=pooled)

    def _limit(self, index: int) -> float:
        """The probability above which a concept is found."""
        return self.redirectors[index].threshold if self.threshold is None else self.threshold

    def _weigh(self, images: list[int], judged: list[Judgement], again: list[bool]) -> None:
        """Tells an attack the log odds, which don't saturate as probabilities do."""
        shares = [[self._limit(index) * (self.hold if held else 1.0) for index in range(len(judged))] for held in again]
        odds = torch.stack([judgement.logits[: len(images), 1] - judgement.logits[: len(images), 0] for judgement in judged], dim=1)
        self.run.weigh(images, odds, torch.logit(torch.tensor(shares, dtype=torch.float64), eps=1e-9).tolist())

    def _note_risk(self, image: int, risks: list[float], fired: list[int]) -> None:
        """Fills in the highest risk until the first redirection, relative to its limit."""
        best = fired[0] if fired else max(range(len(risks)), key=lambda index: risks[index] - self._limit(index))
        margin = risks[best] - self._limit(best)
        if self.margins.get(image, -1.0) > 0 or margin <= self.margins.get(image, -1.0):
            return
        self.margins[image] = margin
        concept = self.redirectors[best].concept if fired else None
        self.note(image, flagged=bool(fired), concept=concept, score=risks[best], threshold=self._limit(best))

    def _note_action(self, image: int, strength: float) -> None:
        """Fills in when and how far the prompt was redirected; until the end, since p̂ stays in use."""
        action = self.run.action(self.position, image, self.name)
        first = self.run.index + int(self.late)
        steps = (action.steps[0] if action.steps else first, self.run.total)
        self.note(image, acted=False, action="redirected", steps=steps, strength=max(strength, action.strength or 0.0))
        self.run.record("redirected", image=image, strength=round(strength, 4))


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; tensors of inference mode don't tell."""
    return None if tensor.is_inference() else tensor._version
