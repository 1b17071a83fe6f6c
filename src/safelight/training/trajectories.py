"""What a denoiser is given, step by step, while a pipeline makes pictures: recorded, and stored for training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attach import guard
from ..flow import Call
from ..generator import Generator
from ..method import Method
from .examples import Example, digest, name_of
from .shards import Shards

Progress = Callable[[str, int, int], None]


@dataclass(kw_only=True, eq=False)
class Trajectory(Method):
    """Keeps the latents of each step and the prompt's embeddings; the images stay bit-identical.

    Recording trajectories of a frozen model follows SafeRedir (Liu et al., 2026, https://arxiv.org/abs/2601.08623).
    """

    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per step: latents as maps [batch, channels, height, width], timesteps [batch]."""
    prompts: list[Tensor | None] = field(default_factory=list)
    """The text's embedding [batch, tokens, width], and the pooled one."""

    def begin(self) -> None:
        """Drops what was kept of the generation before."""
        self.kept.clear()
        self.prompts.clear()

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Keeps a copy of the conditional rows."""
        if call.conditional:
            maps = self.run.backbone.grid(call.latents[call.cond], call.layout)
            times = call.timestep.expand(len(call.latents))[call.cond]
            self.kept.append((maps.detach().to("cpu", torch.float16, copy=True), times.detach().float().cpu()))
            if not self.prompts:
                self.prompts += [call.text[call.cond].cpu().clone(), None if call.pooled is None else call.pooled[call.cond].cpu().clone()]
        return denoise(call)


def record(
    generator: Generator, examples: Sequence[Example], out: Path, *, batch: int = 16, progress: Progress = lambda *_: None
) -> Shards:
    """Makes the examples with the plain model; one file per example, so that an interrupted recording goes on where it stopped.

    Under `accelerate launch`, processes share the batches; each returns when all are done.
    """
    shards = Shards(out, {"examples": digest(examples), "count": len(examples)})
    quick = Generator(generator.pipe, {**generator.settings, "output_type": "latent"})
    crew = workers()
    for start in range(0, len(examples), batch)[crew.process_index :: crew.num_processes]:
        progress("recording", start, len(examples))
        chosen, trajectory = range(start, min(start + batch, len(examples))), Trajectory()
        if all(name_of(i) in shards for i in chosen):
            continue  # batches are made whole: in another company, the last bit of a row may differ
        with guard(generator.pipe, trajectory, unjudged_images="accept"):
            quick([examples[i] for i in chosen])
        latents, times = (torch.stack(parts, dim=1) for parts in zip(*trajectory.kept, strict=True))
        text, pooled = trajectory.prompts
        assert text is not None
        for place, i in enumerate(chosen):
            parts = {"latents": latents[place], "times": times[place], "text": text[place]}
            shards.write(name_of(i), parts if pooled is None else parts | {"pooled": pooled[place]})
    crew.wait_for_everyone()
    progress("recording", len(examples), len(examples))
    return shards


@dataclass(frozen=True)
class Alone:
    """One process that waits for nobody."""

    process_index: int = 0
    num_processes: int = 1

    def wait_for_everyone(self) -> None:
        """Returns at once."""


def workers() -> Any:
    """The processes that work on a recording: those that `accelerate launch` or `torchrun` started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone()
    from accelerate import PartialState

    return PartialState()
