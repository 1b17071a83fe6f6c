"""Trains the testbed's U-Net by noise prediction, with CLIP's tokens as its text."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...fitting import Loss, Recipe
from ..schedules import noise_schedule
from .latents import Latents, Prompts, captions, choose, noise_like

RECIPE = Recipe(lr=1.2e-3, betas=(0.9, 0.99), ema=0.998, seed=5)


def loss_of(unet: UNet2DConditionModel, prompts: Prompts, data: Latents, batch: int = 48, device: str = "cpu") -> Loss:
    """Noise prediction with min-SNR weights (Hang et al., 2023, https://arxiv.org/abs/2303.09556)."""
    noising = noise_schedule()
    images, alphas = data.images.to(device), noising.alphas_cumprod.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        rows = choose(generator, len(images), batch)
        x = images[rows].contiguous(memory_format=torch.channels_last)
        _, text, _ = prompts(captions(generator, [data.scenes[i] for i in rows.tolist()], 0.1), device)
        time = torch.randint(1000, (batch,), generator=generator).to(device)
        noise = noise_like(generator, x)
        predicted = unet(noising.add_noise(x, noise, time), time, text, return_dict=False)[0].float()
        snr = alphas[time] / (1 - alphas[time])
        weight = snr.clamp(max=5) / snr
        return ((predicted - noise).pow(2).mean(dim=(1, 2, 3)) * weight).sum() / weight.sum()

    return loss
