"""Trains the testbed's second MM-DiT by flow matching, with SD3's text: CLIP's tokens, then T5's, and CLIP's pooled vector twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...fitting import Loss, Recipe
from .latents import Latents, Prompts, captions, choose, noise_like

RECIPE = Recipe(lr=1.5e-3, muon_lr=3e-3, ema=0.998, seed=7)


def loss_of(transformer: Any, prompts: Prompts, data: Latents, batch: int = 48, device: str = "cpu") -> Loss:
    """Velocity matching at logit-normal times."""
    images = data.images.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        rows = choose(generator, len(images), batch)
        x = images[rows]
        text, pooled = joint_text(prompts, captions(generator, [data.scenes[i] for i in rows.tolist()], 0.1), device)
        nothing = joint_text(prompts, [""], device)[1]
        dropped = (torch.rand(batch, 1, generator=generator) < 0.5).to(device)  # keeps the pooled vector a weak lever
        time = torch.sigmoid(torch.randn(batch, generator=generator) + 0.2).to(device)
        noise = noise_like(generator, x)
        velocity = transformer(
            hidden_states=torch.lerp(x, noise, time[:, None, None, None]),
            encoder_hidden_states=text,
            pooled_projections=torch.where(dropped, nothing, pooled),
            timestep=1000 * time,
            return_dict=False,
        )[0]
        return (velocity.float() - (noise - x)).pow(2).mean()

    return loss


def joint_text(prompts: Prompts, texts: list[str], device: Any) -> tuple[Tensor, Tensor]:
    """What StableDiffusion3Pipeline makes of prompts: tokens [batch, 32, width] and pooled [batch, 2 * width]."""
    t5, clip, pooled = prompts(texts, device, layer=-2)
    return torch.cat([clip, t5], dim=1), torch.cat([pooled, pooled], dim=1)
