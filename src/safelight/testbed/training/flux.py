"""Trains the testbed's MM-DiT by flow matching, on generation and on editing (Kontext's reference tokens) at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...fitting import Loss, Recipe
from .latents import Latents, Prompts, captions, choose, instructions, noise_like

RECIPE = Recipe(lr=1.5e-3, muon_lr=3e-3, ema=0.998, seed=4)
EDIT_SHARE = 0.35  # of the batches


def pack(latents: Tensor) -> Tensor:
    """Latents [batch, channels, height, width] as tokens [batch, height * width / 4, 4 * channels]."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def image_ids(side: int, group: int) -> Tensor:
    """Positions [tokens, 3] of a square image's tokens: (group, y, x); group 1 is the reference image."""
    grid = torch.arange(side)
    return torch.stack([torch.full((side, side), group), grid[:, None].expand(side, side), grid.expand(side, side)], -1).view(-1, 3).float()


def loss_of(transformer: Any, prompts: Prompts, data: Latents, batch: int = 48, device: str = "cpu") -> Loss:
    """Velocity matching at logit-normal times; batches of generation and of editing alternate at random."""
    own, reference = image_ids(8, 0).to(device), image_ids(8, 1).to(device)
    images, sources, targets = (pack(tensor).to(device) for tensor in (data.images, data.sources, data.targets))

    def loss(generator: torch.Generator) -> Tensor:
        if torch.rand((), generator=generator) < EDIT_SHARE:
            rows = choose(generator, len(data.edits), batch // 2)
            texts = instructions(generator, [data.edits[i] for i in rows.tolist()], 0.1)
            return match(generator, targets[rows], sources[rows], texts)
        rows = choose(generator, len(data.scenes), batch)
        texts = captions(generator, [data.scenes[i] for i in rows.tolist()], 0.1)
        return match(generator, images[rows], None, texts)

    def match(generator: torch.Generator, x: Tensor, source: Tensor | None, texts: list[str]) -> Tensor:
        text, _, pooled = prompts(texts, device)
        nothing = prompts([""], device)[2]
        dropped = (torch.rand(len(x), 1, generator=generator) < 0.5).to(device)  # keeps the pooled vector a weak lever
        time = torch.sigmoid(torch.randn(len(x), generator=generator) + 0.2).to(device)
        noise = noise_like(generator, x)
        noisy = torch.lerp(x, noise, time[:, None, None])
        velocity = transformer(
            hidden_states=noisy if source is None else torch.cat([noisy, source], dim=1),
            encoder_hidden_states=text,
            pooled_projections=torch.where(dropped, nothing, pooled),
            timestep=time,
            img_ids=own if source is None else torch.cat([own, reference]),
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            return_dict=False,
        )[0][:, : x.shape[1]]
        return (velocity.float() - (noise - x)).pow(2).mean()

    return loss
