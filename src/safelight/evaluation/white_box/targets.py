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

AT = {"flow": 0.05, "variance preserving": 0.25}
"""After which share of the steps the prompt's part of a prediction tells most of the picture, by how latents are scaled."""


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


def image_target(generator: Generator, requests: Sequence[Request], at: float | None = None) -> Target:
    """As UnlearnDiffAtk has it: the noise in a noised picture of the concept, which the bare generator makes from the prompt.

    The noise is that from which the request's own seed begins, so that what is learned is about the picture that counts.

    Args:
        generator: the pipeline.
        requests: the original prompts.
        at: the share of the steps that lie behind; None: where a prompt says most, see `AT`.
    """
    path = record(generator, requests, whole=True)
    index = _index(generator.pipe, len(path.timesteps), at)
    levels = [_noised(generator.pipe, path.final, path.latents[0], path.timesteps[step], step) for step in range(index + 1)]
    return _bounded(generator, requests, [latents for latents, _ in levels], levels[-1][1])


def model_target(generator: Generator, requests: Sequence[Request], at: float | None = None) -> Target:
    """As P4D has it: what the bare denoiser predicts for the original prompt, on the way that it takes with it."""
    path = record(generator, requests, at)
    return _bounded(generator, requests, path.latents, None)


def _index(pipe: Any, total: int, at: float | None) -> int:
    share = AT[Backbone.of(pipe).latent_scale] if at is None else at
    return min(total - 1, round(share * total))


def _bounded(generator: Generator, requests: Sequence[Request], latents: Sequence[Tensor], wanted: Tensor | None) -> Target:
    """With the errors of the original prompts and of none; `wanted` None: what is predicted for the original ones."""
    view = look(generator, (), requests, View(latents, blank=True, skim=True))
    assert view.bare is not None
    assert view.empty is not None
    goal = view.bare if wanted is None else wanted
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
    """Remembers what the denoiser is given, until the step that is looked at; None: to the end."""

    def __init__(self, at: float | None, whole: bool) -> None:
        self.at, self.whole = at, whole
        self.latents: list[Tensor] = []  # shared by the copy that lives for the generation
        self.timesteps: list[Tensor] = []
        self.final: list[Tensor] = []

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        if call.conditional:
            self.latents.append(call.latents[call.cond].clone())
            self.timesteps.append(call.timestep.flatten()[-1].clone())
            if not self.whole and self.run.index == _index(self.run.backbone.pipe, self.run.total, self.at):
                raise Enough
        return denoise(call)

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        self.final[:] = [advance(step)]
        return self.final[0]


def record(generator: Generator, requests: Sequence[Request], at: float | None = None, *, whole: bool = False) -> Path:
    """What happens without any guard, until the step that is looked at, or to the end."""
    recorder = _Recorder(at, whole)
    try:
        with guard(generator.pipe, recorder, unjudged_images="accept"):
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
