"""SafeRedir's network, for any text width, prompt length and latent layout."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

TIME_WIDTH, TIME_PERIOD = 320, 10_000.0


class Reading(NamedTuple):
    """What a network makes of a batch of prompts and of what they have led to so far."""

    logits: Tensor
    """Safe, unsafe: [batch, 2]."""
    delta: Tensor
    """Where each token of the prompt should go, [batch, tokens, width]; only the direction counts."""
    mask: Tensor
    """Which tokens carry the concept, 0..1, [batch, tokens]."""
    alpha: Tensor
    """How far each token should go, 0..1, [batch, tokens, 1]."""
    pooled: tuple[Tensor, Tensor] | None = None
    """The same for the pooled embedding: direction [batch, width], and how far [batch, 1]."""

    @property
    def unsafe(self) -> Tensor:
        """The probability of being unsafe, in single precision, [batch]."""
        return self.logits.float().softmax(-1)[:, 1]

    def take(self, rows: slice) -> Reading:
        """Some rows only."""
        pooled = None if self.pooled is None else (self.pooled[0][rows], self.pooled[1][rows])
        return Reading(self.logits[rows], self.delta[rows], self.mask[rows], self.alpha[rows], pooled)


class Redirector(nn.Module):
    """Watches latents, timestep and prompt; tells whether they are unsafe, and where each token should go.

    SafeRedir (Liu et al., 2026, https://arxiv.org/abs/2601.08623), section 3, less the defects of its released code: the embedding of
    each token is fed to its own delta, normalisation doesn't depend on the batch, positions are sinusoidal and so of any length.
    """

    def __init__(
        self, channels: int, text_width: int, pooled_width: int = 0, *, width: int = 128, rank: int = 64, heads: int = 4, dropout: float = 0.2
    ) -> None:  # fmt: skip
        """Makes one with random weights.

        Args:
            channels: of the latents (of a packed token, where latents are packed).
            text_width: of a token's embedding.
            pooled_width: of the pooled embedding that the denoiser gets beside the tokens; 0: none.
            width: of the hidden layers.
            rank: of the deltas.
            heads: of the attentions over the prompt.
            dropout: in training.
        """
        super().__init__()
        self.settings = {
            "channels": channels, "text_width": text_width, "pooled_width": pooled_width, "width": width, "rank": rank, "heads": heads,
        }  # fmt: skip
        stages = (width // 4, width // 2, width)
        self.latent_encoder = nn.Sequential(
            nn.Conv2d(channels, stages[0], 3, stride=2, padding=1),
            *(_Residual(before, after) for before, after in itertools.pairwise(stages)),
            _Mean(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Dropout(dropout),
        )
        self.time_encoder = nn.Sequential(nn.Linear(TIME_WIDTH, 64), nn.SiLU(), nn.LayerNorm(64))
        self.prompt_norm = nn.LayerNorm(text_width)
        joint = width + 64
        self.query = nn.Linear(joint, text_width)
        self.attention = nn.MultiheadAttention(text_width, heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(text_width)
        seen = joint + 2 * text_width + pooled_width
        self.classifier = nn.Sequential(nn.Linear(seen, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2))
        self.delta = nn.Sequential(
            nn.Linear(joint + 2 * text_width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, rank, bias=False),
            nn.Linear(rank, text_width),
        )
        self.context = nn.MultiheadAttention(text_width, heads, batch_first=True)
        self.mask = nn.Sequential(nn.Linear(2 * text_width, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, 1))
        self.alpha = nn.Sequential(nn.Linear(text_width, width), nn.ReLU(), nn.Linear(width, 1))
        self.pooled = nn.Sequential(nn.Linear(seen, 2 * width), nn.ReLU(), nn.Linear(2 * width, pooled_width + 1)) if pooled_width else None

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> Reading:
        """Reads a batch.

        Args:
            latents: [batch, channels, height, width], as the denoiser gets them.
            text: [batch, tokens, text_width].
            timestep: 0..1000, [batch].
            pooled: [batch, pooled_width], if the network was made for one.
        """
        joint = torch.cat([self.latent_encoder(latents), self.time_encoder(sinusoidal(timestep, TIME_WIDTH).to(latents))], dim=-1)
        tokens = self.prompt_norm(text)
        attended, _ = self.attention(self.query(joint)[:, None], tokens, tokens, need_weights=False)
        attended = self.attention_norm(attended[:, 0] + tokens.mean(1))
        extra = [] if self.pooled is None or pooled is None else [pooled]
        seen = torch.cat([joint, tokens.mean(1), attended, *extra], dim=-1)
        placed = tokens + sinusoidal(torch.arange(text.shape[1], device=text.device), text.shape[2]).to(tokens)
        context, _ = self.context(placed, placed, placed, need_weights=False)
        around = torch.cat([joint, attended], dim=-1)[:, None].expand(-1, text.shape[1], -1)
        mask = self.mask(torch.cat([tokens, context], dim=-1))[..., 0].sigmoid()
        moved = None
        if self.pooled is not None:
            wanted = self.pooled(seen)
            moved = wanted[:, :-1], wanted[:, -1:].sigmoid()
        return Reading(self.classifier(seen), self.delta(torch.cat([around, tokens], dim=-1)), mask, self.alpha(placed).sigmoid(), moved)


def redirect(embedding: Tensor, delta: Tensor, strength: Tensor) -> Tensor:
    """P + strength ⊙ Δ/‖Δ‖ ⊙ ‖p‖: each embedding [..., width] is moved by at most `strength` [..., 1] of its norm."""
    return embedding + strength * normalize(delta.float(), dim=-1).to(embedding.dtype) * embedding.norm(dim=-1, keepdim=True)


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions [n] at `width` / 2 frequencies, [n, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(TIME_PERIOD) * torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _Residual(nn.Module):
    """Two convolutions that halve the grid, beside a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.first_norm = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.second_norm = nn.GroupNorm(8, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.second_norm(self.second(silu(self.first_norm(self.first(maps)))))
        return silu(inner + self.shortcut(maps))


class _Mean(nn.Module):
    """The mean over the grid."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))
