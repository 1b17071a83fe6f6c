"""Feature maps in the Fourier domain."""

from __future__ import annotations

import torch
from torch import Tensor


def attenuate(tokens: Tensor, reference: Tensor, grid: tuple[int, int], scale: float, cutoff: int) -> Tensor:
    """Multiplies low frequencies by `scale` where they are stronger than those of `reference`.

    Args:
        tokens: maps as tokens, [batch, height * width, channels].
        reference: what to compare with, of the same shape.
        grid: height and width.
        scale: the factor.
        cutoff: frequencies of at most so many periods per side, in both directions, are low.
    """
    own, other = (torch.fft.fft2(part.float().unflatten(1, grid), dim=(1, 2)) for part in (tokens, reference))
    low = _low(grid[0], cutoff, tokens.device)[:, None] & _low(grid[1], cutoff, tokens.device)[None, :]
    weaker = low[None, :, :, None] & (own.abs() > other.abs())
    changed = torch.fft.ifft2(torch.where(weaker, own * scale, own), dim=(1, 2)).real
    return changed.flatten(1, 2).to(tokens)


def _low(size: int, cutoff: int, device: torch.device) -> Tensor:
    return (torch.fft.fftfreq(size, device=device) * size).abs() <= cutoff


def grid_of(tokens: int, latents: tuple[int, int]) -> tuple[int, int]:
    """The grid of so many tokens, where that of the latents is known: U-Nets work on coarser ones inside.

    Raises:
        ValueError: if there is none.
    """
    height, width = latents
    factor = 1
    while factor <= max(height, width):
        grid = (-(-height // factor), -(-width // factor))
        if grid[0] * grid[1] == tokens:
            return grid
        factor *= 2
    raise ValueError(f"{tokens} tokens are no coarser grid of {height} x {width}; this denoiser's features can't be filtered")
