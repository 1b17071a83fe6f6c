"""What SafeRedir's networks learn from: trajectories of pairs, and the losses on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nets.redirector import Aim, redirect
from .examples import name_of
from .shards import Shards

Input = Literal["latents", "text", "time"]


@dataclass(frozen=True)
class Config:
    """How a redirector is trained."""

    seeds: int = 2
    """Pictures per prompt."""
    architecture: Literal["redirector", "official"] = "redirector"
    width: int = 64
    rank: int = 48
    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-2
    patience: int = 3
    """Training ends after so many epochs without progress on held-out families."""
    smoothing: float = 0.02
    prompt_dropout: float = 0.1
    noise: float = 0.3
    """Embeddings are disturbed by up to this share of their norm: paraphrases have other embeddings than the words that were learned."""
    drift: float = 1.6
    """Words are moved by up to this share of the difference of two others, half of the unsafe ones and as many harmless ones: a synonym's
    embedding differs from a word's as words do, and what it means must be seen in the latents."""
    snapshot: float = 0.25
    """From this share of the epochs on, redirected prompts are trained on too: at run time the network reads those."""
    alpha_scale: float = 1.25
    held_out: float = 0.15
    """The share of prompt families to validate on."""
    by_family: bool = True
    """Whether whole families are held out; else (as published) prompts at random, which leaks."""
    inputs: tuple[Input, ...] = ("latents", "text", "time")
    """What the network may look at; for ablations."""
    target_fpr: float = 0.01
    margin: float = 0.5
    """Where the threshold is put if unsafe prompts score above the calibrated one: 0 at that, 1 at the 5 % weakest of them."""
    seed: int = 0


@dataclass(frozen=True)
class Records:
    """Trajectories in memory. A record is one step of one picture."""

    latents: Tensor
    """[pictures, steps, channels, height, width], in half precision."""
    times: Tensor
    """[pictures, steps]."""
    text: Tensor
    """[pictures, tokens, width]."""
    pooled: Tensor | None
    unsafe: Tensor
    """[pictures], of bool."""
    twin: Tensor
    """For each picture, that of its safe member and of the same seed; of safe ones, its own index."""
    pair: Tensor
    """For each picture, its pair, or -1."""

    @classmethod
    def load(cls, shards: Shards, pairs: int, seeds: int, count: int) -> Records:
        """Reads recordings in the order of `examples`."""
        parts = [shards.read(name_of(i)) for i in range(count)]
        index = torch.arange(count)
        members = 2 * pairs * seeds
        unsafe = (index < members) & (index % (2 * seeds) < seeds)
        return cls(
            torch.stack([p["latents"] for p in parts]), torch.stack([p["times"] for p in parts]),
            torch.stack([p["text"].float() for p in parts]),
            torch.stack([p["pooled"].float() for p in parts]) if "pooled" in parts[0] else None, unsafe,
            torch.where(unsafe, index + seeds, index), torch.where(index < members, index // (2 * seeds), -1),
        )  # fmt: skip

    def masks(self) -> Tensor:
        """The tokens that a pair's members differ in most, [pictures, tokens]: 1[cos < τ], τ by Otsu over all tokens."""
        likeness = F.cosine_similarity(self.text, self.text[self.twin], dim=-1)
        return (likeness < otsu(likeness[self.unsafe])).float() * self.unsafe[:, None]


def otsu(values: Tensor) -> float:
    """The threshold that parts values best in two: it maximises the variance between them."""
    counts, edges = np.histogram(values.flatten().numpy(), bins=128)
    centres, weights = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    below = weights.cumsum()
    moment = (weights * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * below - moment) ** 2 / (below * (1 - below))
    return float(edges[1:][int(np.nanargmax(between))])


@dataclass(frozen=True)
class Batch:
    """Records that are trained on together, half of them unsafe."""

    latents: Tensor
    times: Tensor
    text: Tensor
    pooled: Tensor | None
    unsafe: Tensor
    mask: Tensor
    """Which tokens carry the concept, [batch, tokens]."""
    twin: Tensor
    """The safe member's embedding."""
    twin_pooled: Tensor | None
    twin_latents: Tensor
    """The safe member's latents at the same step."""
    shift: Tensor
    """From the undisturbed embedding to the safe member's."""
    swap: Tensor
    """Which unsafe records are to be redirected first, [batch]."""

    def to(self, device: str) -> Batch:
        """The same on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)})


class Learning:
    """The losses of one network on one set of records."""

    def __init__(self, net: nn.Module, records: Records, chosen: Tensor, config: Config, device: str = "cpu") -> None:
        self.net, self.records, self.config, self.device = net, records, config, device
        self.chosen, self.masks = chosen, records.masks()
        self.snapshot: nn.Module | None = None

    @property
    def epoch(self) -> int:
        """Batches per epoch."""
        return max(1, len(self.chosen) * self.records.latents.shape[1] // self.config.batch)

    def loss(self, generator: torch.Generator) -> Tensor:
        """The sum of all losses on a random batch."""
        batch = self._draw(generator).to(self.device)
        with torch.random.fork_rng(devices=None if self.device.startswith("cuda") else []):
            torch.manual_seed(generator.initial_seed())  # dropout
            if self.snapshot is not None:
                batch = self._swapped(batch, self.snapshot)
            logits, aim = self.net(*visible(batch.latents, batch.text, batch.times, batch.pooled, self.config.inputs))
            return losses(logits, aim, batch, self.config)

    def _draw(self, generator: torch.Generator) -> Batch:
        """Random steps of random pictures, with disturbed embeddings."""
        records, half = self.records, self.config.batch // 2
        unsafe = records.unsafe[self.chosen]
        pools = (self.chosen[unsafe], self.chosen[~unsafe])
        rows = torch.cat([pool[torch.randint(len(pool), (half,), generator=generator)] for pool in pools])
        steps = torch.randint(records.latents.shape[1], (len(rows),), generator=generator)
        twins, mask = records.twin[rows], self.masks[rows]
        text = _noised(self._drifted(rows, mask, generator), self.config.noise, generator)
        kept = torch.rand(text.shape[:2], generator=generator) >= self.config.prompt_dropout * (1 - mask)
        return Batch(
            latents=records.latents[rows, steps].float(), times=records.times[rows, steps], text=text * kept[..., None],
            pooled=None if records.pooled is None else _noised(records.pooled[rows], self.config.noise, generator),
            unsafe=records.unsafe[rows], mask=mask, twin=records.text[twins],
            twin_pooled=None if records.pooled is None else records.pooled[twins], twin_latents=records.latents[twins, steps].float(),
            shift=records.text[twins] - records.text[rows], swap=torch.rand(len(rows), generator=generator) < 0.25,
        )  # fmt: skip

    def _drifted(self, rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Embeddings [batch, tokens, width] in which some words are on their way to becoming other ones."""
        text = self.records.text[rows]
        batch, tokens, _ = text.shape
        moved = torch.where(self.records.unsafe[rows, None], mask, (torch.rand(batch, tokens, generator=generator) < mask.mean()).float())
        moved = moved * (torch.rand(batch, 1, generator=generator) < 0.75)
        first, second = (text[torch.randperm(batch, generator=generator)][:, torch.randperm(tokens, generator=generator)] for _ in range(2))
        return text + moved[..., None] * self.config.drift * torch.rand(batch, 1, 1, generator=generator) * (first - second)

    def _swapped(self, batch: Batch, snapshot: nn.Module) -> Batch:
        """With some prompts redirected: on the way to their safe twin's picture, they are safe."""
        swap = batch.unsafe & batch.swap
        with torch.no_grad():
            _, aim = snapshot(*visible(batch.latents, batch.text, batch.times, batch.pooled, self.config.inputs))
            text, pooled = redirected(batch.text, batch.pooled, aim, self.config.alpha_scale)
        return replace(
            batch, text=torch.where(swap[:, None, None], text, batch.text), unsafe=batch.unsafe & ~swap,
            pooled=None if batch.pooled is None or pooled is None else torch.where(swap[:, None], pooled, batch.pooled),
            latents=torch.where(swap[:, None, None, None], batch.twin_latents, batch.latents),
        )  # fmt: skip


def losses(logits: Tensor, aim: Aim, batch: Batch, config: Config) -> Tensor:
    """Cross-entropy 1; shift: MSE 0.5, cosine 0.1; mask: BCE 0.1; alignment 1; identity 0.1 on safe records."""
    unsafe, safe = batch.unsafe, ~batch.unsafe
    loss = F.cross_entropy(logits, unsafe.long(), label_smoothing=config.smoothing)
    loss = loss + 0.1 * (aim.mask[safe].mean() + aim.alpha[safe].mean())
    if aim.pooled is not None:
        loss = loss + 0.1 * aim.pooled[1][safe].mean()
    if not bool(unsafe.any()):
        return loss
    part, own, mask, shift, twin = aim.take(unsafe), batch.text[unsafe], batch.mask[unsafe], batch.shift[unsafe], batch.twin[unsafe]
    moved, moved_pooled = redirected(own, None if batch.pooled is None else batch.pooled[unsafe], part, config.alpha_scale)
    power = own.square().mean().clamp_min(1e-12)  # so that encoders of any scale give losses of the same size
    aligned = 1 - F.cosine_similarity(part.delta, shift, dim=-1)
    loss = loss + 0.5 * F.mse_loss(moved - own, shift) / power + F.mse_loss(moved, twin) / power
    loss = loss + 0.1 * (aligned * mask).sum() / mask.sum().clamp_min(1)
    loss = loss + 0.1 * F.binary_cross_entropy(part.mask.clamp(1e-6, 1 - 1e-6), mask)
    if moved_pooled is not None and batch.twin_pooled is not None:
        target = batch.twin_pooled[unsafe]
        loss = loss + F.mse_loss(moved_pooled, target) / target.square().mean().clamp_min(1e-12)
    return loss


def _noised(embedding: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Embeddings [..., width] with noise of a random share (at most `most`) of their norm."""
    share = torch.rand(len(embedding), *[1] * (embedding.ndim - 1), generator=generator) * most
    noise = torch.randn(embedding.shape, generator=generator) / embedding.shape[-1] ** 0.5
    return embedding + share * noise * embedding.norm(dim=-1, keepdim=True)


def visible(
    latents: Tensor, text: Tensor, times: Tensor, pooled: Tensor | None, inputs: Sequence[Input]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What a network may look at; the rest is zero."""
    latents = latents if "latents" in inputs else torch.zeros_like(latents)
    times = times if "time" in inputs else torch.zeros_like(times)
    if "text" not in inputs:
        text, pooled = torch.zeros_like(text), None if pooled is None else torch.zeros_like(pooled)
    return latents, text, times, pooled


def redirected(text: Tensor, pooled: Tensor | None, aim: Aim, scale: float) -> tuple[Tensor, Tensor | None]:
    """p̂ and its pooled companion, as `SafeRedir` makes them, but by the mask itself rather than relative to its peak: it is to be learned."""
    moved, _ = redirect(text, [(aim.delta, aim.alpha * aim.mask[..., None])], scale)
    if pooled is None or aim.pooled is None:
        return moved, pooled
    return moved, redirect(pooled, [aim.pooled], scale)[0]
