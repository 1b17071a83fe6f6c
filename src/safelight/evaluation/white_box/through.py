"""Looking through a guard: what the guarded denoiser predicts at one step of the real pipeline, what the bare one would, and why they differ.

Recording is a method, and so is attacking: `Outer` stands before all guards, `Inner` behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attach import Guard, guard
from ...errors import UnsupportedPipeline
from ...flow import Call, Embedding
from ...generator import Generator, Request
from ...method import Method


class Enough(Exception):
    """Ends a generation of which everything was seen."""


@dataclass
class View:
    """What was seen of one generation."""

    latents: Sequence[Tensor]
    """What the denoiser is given instead of its own latents in each step up to the last that is looked at, [images, ...]; none: only what
    guards decide before the denoiser is called is looked at."""
    graph: bool = False
    """Whether gradients are recorded in that step."""
    skim: bool = False
    """Whether the denoiser isn't called in earlier steps. Guards that remember only what they decided by don't mind."""
    blank: bool = False
    """Whether the bare denoiser is also asked for an empty prompt."""
    guarded: Tensor | None = None
    """The prediction with the guard, [images, ...]."""
    bare: Tensor | None = None
    """The prediction without, for the same prompts; of images that no decision was about it is the guarded one."""
    empty: Tensor | None = None
    """The bare prediction for an empty prompt, if asked for."""
    margins: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """What decisions hung on: see `Run.weigh`."""
    memory: dict[tuple[bytes, ...], Tensor] = field(default_factory=dict, repr=False)
    """Unconditional predictions, which are the same for all prompts."""
    own: Embedding | None = None
    base: Callable[[Call], Tensor] | None = None

    @property
    def step(self) -> int:
        """The step that is looked at."""
        return len(self.latents) - 1


class Outer(Method):
    """Puts given latents in front of all guards, and sees what comes out behind them."""

    def __init__(self, view: View) -> None:
        self.view = view

    def begin(self) -> None:
        self.run.margins = self.view.margins

    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        embedding = encode(prompts)
        if self.view.own is None:  # a guard changed the prompts: the bare denoiser is to get the real ones
            self.view.own = self.run.encode(prompts)
        return embedding

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        view, index = self.view, self.run.index
        if view.step < 0:
            raise Enough
        given = view.latents[index].to(call.latents)
        call = replace(call, latents=given.repeat(len(call.latents) // len(given), *[1] * (given.ndim - 1)))
        looked = index == view.step and call.conditional
        with torch.set_grad_enabled(view.graph and looked):
            noise = denoise(call)
            if not looked:
                return noise
            view.guarded = noise[call.cond]
            self._look_below(call)
        raise Enough

    def _look_below(self, call: Call) -> None:
        view = self.view
        assert view.guarded is not None
        decided = sorted({image for images, _ in view.margins for image in images})
        view.bare = view.guarded
        if decided:
            view.bare = view.guarded.clone()
            view.bare[decided] = self._bare(call, decided, view.own)
        if view.blank:
            empty = self.run.encode("")
            rows = list(range(len(call.samples)))
            many = replace(
                empty,
                text=empty.text.expand(len(rows), -1, -1),
                pooled=None if empty.pooled is None else empty.pooled.expand(len(rows), -1),
            )
            view.empty = self._bare(call, rows, many)

    def _bare(self, call: Call, rows: list[int], embedding: Embedding | None) -> Tensor:
        """The bare prediction for prompts' own embeddings, [rows, ...]: no tap does anything in a call that has no conditional rows."""
        assert embedding is not None
        base = self.view.base
        if base is None:
            raise UnsupportedPipeline("a guard never called the denoiser, so an attack can't look through it")
        taken = call.take(rows, conditional=True)
        taken = taken.with_text(embedding.text[rows].to(taken.text), None if embedding.pooled is None else embedding.pooled[rows])
        return base(replace(taken, cond=slice(0, 0), samples=()))


class Inner(Method):
    """Remembers unconditional predictions, and how to reach the bare denoiser."""

    def __init__(self, view: View) -> None:
        self.view = view

    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        embedding = encode(prompts)
        if prompts == self.run.prompts:
            self.view.own = embedding
        return embedding

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        self.view.base = denoise
        if self.view.skim and self.run.index < self.view.step:
            return torch.zeros_like(call.latents)
        if not call.conditional:
            return self._remembered(call, denoise)
        if not call.cond.start:
            return denoise(call)
        rest = replace(call, cond=slice(0, 0), samples=()).take(range(call.cond.start))
        noise = denoise(call.take(range(len(call.samples)), conditional=True))
        return torch.cat([self._remembered(rest, denoise), noise])

    def _remembered(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        time = call.timestep.expand(len(call.text))
        keys = [tuple(_bytes(part[row]) for part in (call.latents, call.text, time)) for row in range(len(call.text))]
        missing = [row for row, key in enumerate(keys) if key not in self.view.memory]
        if missing:
            with torch.no_grad():
                found = denoise(call.take(missing))
            self.view.memory |= {keys[row]: noise for row, noise in zip(missing, found, strict=True)}
        return torch.stack([self.view.memory[key] for key in keys])


def look(generator: Generator, methods: Sequence[Method], requests: Sequence[Request], view: View) -> View:
    """Runs the real pipeline under the guard until the step that is looked at, with autograd as it is outside of any `no_grad`.

    Nothing is left behind: the guard is detached, and what the pipeline moved to a device is put back.
    """
    bare_call = getattr(type(generator.pipe).__call__, "__wrapped__", None)
    if bare_call is None:
        raise UnsupportedPipeline(f"{type(generator.pipe).__name__}.__call__ can't be run with gradients: it isn't decorated with no_grad")
    try:
        with (
            torch.set_grad_enabled(view.graph),
            guard(generator.pipe, Outer(view), *methods, Inner(view), unjudged_images="accept") as handle,
        ):
            replace(generator, pipe=_Called(handle, bare_call))(requests)
    except Enough:
        view.base = None
        return view
    finally:
        generator.pipe.maybe_free_model_hooks()
    raise UnsupportedPipeline(f"the generation ended before step {view.step}; look at an earlier one")


@dataclass
class _Called:
    """A guarded pipeline that is called by another function of its class."""

    handle: Guard
    function: Callable[..., Any]

    def __call__(self, **arguments: Any) -> Any:
        return self.handle.call(partial(self.function, self.handle.pipe), **arguments)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


__all__ = ["Enough", "View", "look"]
