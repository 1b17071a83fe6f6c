"""The redirector: watches latents, time and prompt; says whether they are unsafe, and where each token should go instead."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Redirection(NamedTuple):
    """What a redirector says of a batch."""

    logits: Tensor
    """[batch, 2]; class 1 is unsafe."""
    delta: Tensor
    """[batch, tokens, width]: which way each token should go."""
    mask: Tensor
    """[batch, tokens] in 0..1: which tokens are to blame."""
    alpha: Tensor
    """[batch, tokens] in 0..1: how far they should go."""
    pooled: Tensor | None = None
    """[batch, pooled width]: what is added to the pooled embedding."""

    def apply(self, prompt: Tensor, scale: float) -> Tensor:
        """p̂ = p + s · α · m ⊙ Δ/‖Δ‖ ⊙ ‖p‖, token by token; the mask comes after the normalisation, where it doesn't cancel."""
        step = scale * (self.alpha * self.mask)[..., None].float()
        direction = F.normalize(self.delta.float(), dim=-1)
        return prompt + (step * direction * prompt.float().norm(dim=-1, keepdim=True)).to(prompt.dtype)


class Redirector(nn.Module):
    """Ours: any latent layout, text width and length; each token has a delta of its own; permuting tokens permutes the deltas."""

    def __init__(self, channels: int, width: int, pooled: int | None = None, hidden: int = 128, text: bool = True, latent: bool = True, time: bool = True) -> None:
        super().__init__()
        self.config = {"channels": channels, "width": width, "pooled": pooled, "hidden": hidden, "text": text, "latent": latent, "time": time}
        self.look = nn.Sequential(_down(channels, 32), _down(32, 64), _down(64, hidden))
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.mix = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.ask = nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.query = nn.Linear(2 * hidden, hidden)
        self.classifier = nn.Sequential(nn.Linear(4 * hidden, hidden), nn.SiLU(), nn.Dropout(0.1), nn.Linear(hidden, 2))
        self.delta = nn.Sequential(nn.Linear(hidden + width, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, width))
        self.mask, self.alpha = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        self.pooled = nn.Sequential(nn.Linear(pooled + hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, pooled)) if pooled else None

    def forward(self, latents: Tensor, prompt: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> Redirection:
        """Latents [batch, channels, height, width] of unit scale, prompts [batch, tokens, width], times [batch] in 0..1."""
        maps = self.look(latents)
        seen = maps.mean((2, 3)) + maps.amax((2, 3))
        when = self.time(waves(timestep, 64).to(latents.dtype))
        seen, when = seen * self.config["latent"], when * self.config["time"]
        tokens = self.mix(self.read(prompt))
        asked, _ = self.ask(self.query(torch.cat([seen, when], 1))[:, None], tokens, tokens, need_weights=False)
        said = torch.cat([asked[:, 0], tokens.amax(1)], 1) * self.config["text"]
        logits = self.classifier(torch.cat([seen, when, said], 1))
        shift = None if self.pooled is None or pooled is None else self.pooled(torch.cat([pooled, tokens.amax(1)], 1))
        delta = self.delta(torch.cat([tokens, prompt], -1))
        return Redirection(logits, delta, self.mask(tokens)[..., 0].sigmoid(), self.alpha(tokens)[..., 0].sigmoid(), shift)


def waves(time: Tensor, width: int) -> Tensor:
    """Sine and cosine of a time in 0..1 at `width / 2` frequencies, [batch, width]."""
    frequencies = torch.exp(math.log(1000) * torch.arange(width // 2, device=time.device) / (width // 2))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _down(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU())
