"""A second trajectory that shares the denoiser with the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .flow import Call, Embedding, Step
from .run import Run


class Branch:
    """Denoises its own latents under another prompt, for some samples of the batch, with its own copy of the scheduler.

    It must run from the first step on, as the scheduler's copy begins there. Rows of other samples follow the main trajectory.
    """

    def __init__(self, run: Run, prompt: Embedding | None, positions: Sequence[int]) -> None:
        """`prompt` has one row for each of `positions`, the samples that get a second trajectory; None: the call's own text."""
        self.run, self.prompt, self.positions = run, prompt, list(positions)
        self.latents: Tensor | None = None
        self._scheduler: Any = None
        self._main: list[Tensor] = []
        self._own: list[Tensor] = []

    def denoise(self, call: Call, noise: Tensor, denoise: Callable[[Call], Tensor]) -> None:
        """Predicts this branch's noise beside the main call, whose prediction was `noise`."""
        if self._scheduler is None:  # not before: the timesteps are set after the prompt is encoded
            self._scheduler = copy_scheduler(self.run.backbone.pipe.scheduler)
        own = call.take(self.positions)
        if self.latents is not None:
            timestep = call.timestep.flatten()[0]
            inputs = (
                self._scheduler.scale_model_input(self.latents, timestep) if hasattr(self._scheduler, "scale_model_input") else self.latents
            )
            inputs = inputs[self.positions]
            own = replace(own, latents=inputs.repeat(len(own.text) // len(inputs), *[1] * (inputs.ndim - 1)).to(own.latents.dtype))
        if self.prompt is not None and own.conditional:
            own = own.with_text(self.prompt.text, self.prompt.pooled)
        self._own.append(denoise(own))
        self._main.append(noise)

    def advance(self, step: Step) -> Tensor:
        """Moves this branch one step; returns latents shaped as the step's, where only this branch's samples mean anything.

        Call it before the main trajectory moves: then both see the same noise, whichever generator it comes from.
        """
        backbone = self.run.backbone
        guided = backbone.guide(self._own, backbone.scale(self._main, step.noise))
        latents = step.latents.clone() if self.latents is None else self.latents
        noise = step.noise.clone()
        noise[self.positions] = guided.to(noise.dtype)
        devices = [latents.device] if latents.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            moved = self._scheduler.step(noise, step.timestep, latents, **own_randomness(step.rest) | {"return_dict": False})[0]
        self.latents, self._own, self._main = moved, [], []
        return moved


def copy_scheduler(scheduler: Any) -> Any:
    """A deep copy that is not wrapped by the guard."""
    clone = object.__new__(type(scheduler))
    clone.__dict__.update(deepcopy({name: value for name, value in vars(scheduler).items() if name != "step"}))
    return clone


def own_randomness(rest: Any) -> dict[str, Any]:
    """The step's further arguments with copies of its generators: the branch sees the same noise and uses none up."""
    rest = dict(rest)
    generator = rest.get("generator")
    if isinstance(generator, torch.Generator):
        rest["generator"] = generator.clone_state()
    elif generator is not None:
        rest["generator"] = [one.clone_state() for one in generator]
    return rest
