"""The records that flow through one generation. All are frozen: who changes one makes a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedPipeline
from .site import Layout, Stream


@dataclass(frozen=True)
class Embedding:
    """Encoded prompts: `text` [batch, tokens, width], `pooled` [batch, width]."""

    text: Tensor
    pooled: Tensor | None = None
    negative_text: Tensor | None = None
    negative_pooled: Tensor | None = None
    ids: Tensor | None = None
    """FLUX's positions of the text tokens, [tokens, 3]."""


@dataclass(frozen=True)
class Call:
    """One evaluation of the denoiser. Under batched guidance its rows are [unconditional; conditional]."""

    latents: Tensor
    """[rows, channels, height, width], or packed [rows, tokens, width]; without reference tokens."""
    text: Tensor
    """[rows, tokens, width]"""
    timestep: Tensor
    """On the scheduler's scale, a scalar or [rows]."""
    layout: Layout
    cond: slice
    """The rows that follow the user's prompt."""
    samples: tuple[int, ...]
    """The image of each conditional row: an index into `Run.prompts`."""
    turn: int = 0
    """Which of this step's calls it is: FLUX asks for the negative prompt's prediction in a second one."""
    pooled: Tensor | None = None
    """[rows, width]"""
    reference: Tensor | None = None
    """The latents of a reference image, [rows, tokens, width]."""
    rows: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Further arguments with one entry per row."""
    rest: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Further arguments that all rows share."""

    @property
    def conditional(self) -> bool:
        """Whether any row follows the user's prompt."""
        return self.cond.start != self.cond.stop

    def with_text(self, text: Tensor, pooled: Tensor | None = None) -> Call:
        """The same call with another prompt in its conditional rows: `text` [batch, tokens, width]."""
        swapped = self.pooled is not None and pooled is not None
        return replace(
            self,
            text=put(self.text, self.cond, text),
            pooled=put(self.pooled, self.cond, pooled) if swapped else self.pooled,  # type: ignore[arg-type]
        )

    def take(self, positions: Sequence[int], *, conditional: bool = False) -> Call:
        """The rows of some samples only, given by their positions in `samples`.

        Keeps both halves of a guided batch unless `conditional` asks for the prompt's rows alone.
        """
        _refuse_row_conditioning(self.rest)
        count = len(self.samples) if self.conditional else len(self.text)
        starts = [self.cond.start] if conditional else range(0, len(self.text), count)
        rows = torch.tensor([start + position for start in starts for position in positions], device=self.text.device)

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        stop = len(rows) if self.conditional else 0
        return replace(
            self,
            latents=self.latents[rows],
            text=self.text[rows],
            timestep=self.timestep[rows] if self.timestep.ndim else self.timestep,
            pooled=pick(self.pooled),
            reference=pick(self.reference),
            rows={name: tensor[rows] for name, tensor in self.rows.items()},
            cond=slice(stop - len(positions) if stop else 0, stop),
            samples=tuple(self.samples[position] for position in positions) if self.conditional else (),
        )


@dataclass(frozen=True)
class Step:
    """One move of the scheduler, from `latents` at `timestep` along `noise`; one row per sample."""

    noise: Tensor
    timestep: Tensor
    latents: Tensor
    rest: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Heads:
    """Query, key and value of one attention, each [batch, heads, tokens, width], conditional rows only."""

    query: Tensor
    key: Tensor
    value: Tensor
    queries: Mapping[Stream, slice]
    """Where each stream's tokens are among the queries."""
    keys: Mapping[Stream, slice]
    bias: Tensor | None = None
    """Added to the logits before the softmax: broadcasts to [batch, heads, queries, keys], and stays small if it does."""
    rows: tuple[int, ...] | None = None
    """Which of the conditional rows these are; None: all."""

    def take(self, rows: Sequence[int]) -> Heads:
        """Some of the rows only."""
        if len(rows) == len(self.query) and self.rows is None:
            return self
        chosen = torch.tensor(rows, device=self.query.device)
        owners = tuple(rows) if self.rows is None else tuple(self.rows[row] for row in rows)
        return replace(self, query=self.query[chosen], key=self.key[chosen], value=self.value[chosen], rows=owners)


def _refuse_row_conditioning(rest: Mapping[str, Any]) -> None:
    """Raises where further arguments hold one entry per row in a form that can't be picked apart."""
    nested = [rest.get(name) or {} for name in ("added_cond_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")]
    names = {name for mapping in nested for name in mapping if name == "image_embeds" or name.startswith("ip_")}
    if names or rest.get("timestep_cond") is not None:
        raise UnsupportedPipeline(
            "an extra branch can't be made with an IP-Adapter or a guidance embedding; unload it, or use another guard"
        )


def put(tensor: Tensor, rows: Any, values: Tensor) -> Tensor:
    """A copy of `tensor` with `values` in `rows`."""
    tensor = tensor.clone()
    tensor[rows] = values.to(tensor.dtype)
    return tensor
