"""Trains the testbed's autoencoder on rendered scenes."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...fitting import Loss, Recipe
from ..captions import sample_edit
from ..scenes import Pixels, render, sample_scene

RECIPE = Recipe(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=0.05, decay=0.7, ema=0.995, seed=1)


def to_tensor(pictures: list[Pixels]) -> Tensor:
    """Pictures [height, width, 3] as one tensor [batch, 3, height, width] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_pictures(random: Random, count: int) -> Tensor:
    """Scenes of the training split, with a share of half-empty ones from edits."""
    return to_tensor([render(sample_edit(random).source if random.random() < 0.15 else sample_scene(random)) for _ in range(count)])


def loss_of(vae: AutoencoderKL, batch: int = 16) -> Loss:
    """L1 + 2 L2 + a little KL."""

    def loss(generator: torch.Generator) -> Tensor:
        x = sample_pictures(Random(generator.initial_seed()), batch).contiguous(memory_format=torch.channels_last)
        x = x.to(vae.device)
        posterior = vae.encode(x).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        z = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        error = vae.decode(z).sample.float() - x
        return error.abs().mean() + 2 * error.pow(2).mean() + 2e-5 * posterior.kl().float().mean() / 4

    return loss


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Moves the latents' mean and deviation per channel into the 1x1 convolutions: latents get unit variance."""
    mean = vae.encode(pictures).latent_dist.mean
    mu, sigma = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    scale = torch.cat([1 / sigma, torch.ones_like(sigma)])[:, None, None, None]
    shift = torch.cat([-mu / sigma, -2 * sigma.log()])
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight.mul_(scale)
    quant.bias.mul_(scale.flatten()).add_(shift)
    post.bias.add_(post.weight[:, :, 0, 0] @ mu)
    post.weight.mul_(sigma[None, :, None, None])
