"""What an attack wants the guarded denoiser to predict, and at which latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attach import guard
from ...backbone import Backbone
from ...errors import UnsupportedPipeline
from ...flow import Call, Step
from ...generator import Generator, Request
from ...method import Method
from .through import Enough, View, look


@dataclass(frozen=True)
class Target:
    """One step of some cases."""

    latents: tuple[Tensor, ...]
    """What the denoiser is given in each step up to this one, [cases, ...] each."""
    wanted: Tensor
    """The prediction that is wanted in this step, [cases, ...]."""
    floor: Tensor
    """The squared error of the bare denoiser with the original prompt, [cases]: a perfect attack."""
    ceiling: Tensor
    """That with an empty prompt, [cases]: no attack at all."""

    def take(self, rows: Sequence[int]) -> Target:
        """Some of the cases, repeated if named more than once."""
        chosen = torch.tensor(rows)
        return Target(
            tuple(latents[chosen] for latents in self.latents), self.wanted[chosen], self.floor[chosen], self.ceiling[chosen]
        )  # fmt: skip

    def error(self, prediction: Tensor) -> Tensor:
        """How far a prediction [cases, ...] is from what is wanted, 0 as near as the original prompt, 1 as far as none, [cases]."""
        span = (self.ceiling - self.floor).abs().clamp_min(1e-3 * self.ceiling)
        return (squared_error(prediction, self.wanted) - self.floor) / span


def squared_error(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each row, [batch]."""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(dim=1)


def image_targets(generator: Generator, requests: Sequence[Request], steps: Sequence[int]) -> dict[int, Target]:
    """As UnlearnDiffAtk has it: the noise in a noised picture of the concept, which the bare generator makes from the prompt.

    The noise is that from which the request's own seed begins, so that what is learned is about the picture that counts.
    """
    path = record(generator, requests)
    final, noise = path.final, path.latents[0]
    levels = [_noised(generator.pipe, final, noise, path.timesteps[index], index) for index in range(max(steps) + 1)]
    latents = [level[0] for level in levels]
    return {step: _bounded(generator, requests, latents[: step + 1], lambda _, wanted=levels[step][1]: wanted) for step in steps}  # type: ignore[misc]


def model_targets(generator: Generator, requests: Sequence[Request], steps: Sequence[int]) -> dict[int, Target]:
    """As P4D has it: what the bare denoiser predicts for the original prompt, on the way that it takes with it."""
    path = record(generator, requests, last=max(steps))
    return {step: _bounded(generator, requests, path.latents[: step + 1], lambda bare: bare) for step in steps}


def _bounded(generator: Generator, requests: Sequence[Request], latents: Sequence[Tensor], wanted: Callable[[Tensor], Tensor]) -> Target:
    view = look(generator, (), requests, View(latents, blank=True))
    assert view.bare is not None
    assert view.empty is not None
    goal = wanted(view.bare)
    return Target(tuple(latents), goal, squared_error(view.bare, goal), squared_error(view.empty, goal))


@dataclass(frozen=True)
class Path:
    """The latents of a generation without any guard."""

    latents: list[Tensor]
    """What the denoiser got in each step, [images, ...]."""
    timesteps: list[Tensor]
    final: Tensor
    """What the last step made, [images, ...]."""


class _Recorder(Method):
    def __init__(self, last: int | None) -> None:
        self.last = last
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.final: list[Tensor] = []

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        if call.conditional:
            self.latents.append(call.latents[call.cond].clone())
            self.timesteps.append(call.timestep.flatten()[-1].clone())
            if self.run.index == self.last:
                raise Enough
        return denoise(call)

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        self.final[:] = [advance(step)]
        return self.final[0]


def record(generator: Generator, requests: Sequence[Request], last: int | None = None) -> Path:
    """What happens without any guard, until the step `last`."""
    recorder = _Recorder(last)  # its lists are shared by the copy that lives for the generation
    try:
        with guard(generator.pipe, recorder):
            generator(requests)
    except Enough:
        generator.pipe.maybe_free_model_hooks()
    return Path(recorder.latents, recorder.timesteps, recorder.final[0] if recorder.final else recorder.latents[-1])


def _noised(pipe: Any, final: Tensor, noise: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """A picture's latents with noise, as the denoiser gets them in a step, and what it should predict."""
    scheduler = pipe.scheduler
    if Backbone.of(pipe).latent_scale == "flow":
        sigma = scheduler.sigmas[index].to(final)
        return sigma * noise + (1 - sigma) * final, noise - final
    share = scheduler.alphas_cumprod.to(final)[int(timestep)]
    kept, added = share.sqrt(), (1 - share).sqrt()
    wanted = {"epsilon": noise, "v_prediction": kept * noise - added * final, "sample": final}
    kind = scheduler.config.prediction_type
    if kind not in wanted:
        raise UnsupportedPipeline(
            f"what {type(scheduler).__name__} predicts ({kind!r}) is unknown here; use epsilon, v_prediction or a flow"
        )
    return kept * final + added * noise, wanted[kind]
