"""SafeRedir's network, for any text width, prompt length and latent layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

TIME_WIDTH, TIME_PERIOD = 320, 10_000.0


class Judgement(NamedTuple):
    """Whether a batch of prompts, with what they have led to so far, is unsafe."""

    logits: Tensor
    """Safe, unsafe: [batch, 2]."""
    features: tuple[Tensor, ...]
    """What `aim` needs, each [batch, ...]."""

    @property
    def unsafe(self) -> Tensor:
        """The probability of being unsafe, in single precision, [batch]."""
        return self.logits.float().softmax(-1)[:, 1]


class Aim(NamedTuple):
    """Where the tokens of prompts should go."""

    delta: Tensor
    """The way of each token, [batch, tokens, width]; only its direction counts."""
    mask: Tensor
    """Which tokens carry the concept, 0..1, [batch, tokens]."""
    alpha: Tensor
    """How far each token should go, 0..1, [batch, tokens, 1]."""
    pooled: tuple[Tensor, Tensor] | None = None
    """The same for the pooled embedding: direction [batch, width], and how far [batch, 1]."""

    def to(self, device: str) -> Aim:
        """The same on another device."""
        pooled = None if self.pooled is None else (self.pooled[0].to(device), self.pooled[1].to(device))
        return Aim(self.delta.to(device), self.mask.to(device), self.alpha.to(device), pooled)

    def take(self, rows: Any) -> Aim:
        """Some rows only."""
        pooled = None if self.pooled is None else (self.pooled[0][rows], self.pooled[1][rows])
        return Aim(self.delta[rows], self.mask[rows], self.alpha[rows], pooled)


class Redirector(nn.Module):
    """Watches latents, timestep and prompt; tells whether they are unsafe, and where each token should go.

    SafeRedir (Liu et al., 2026, https://arxiv.org/abs/2601.08623), section 3, less the defects of its released code: the embedding of
    each token is fed to its own delta, normalisation doesn't depend on the batch, positions are sinusoidal and so of any length. The
    classifier also gets the strongest evidence of any single token.
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
        self.evidence = nn.Sequential(nn.Linear(text_width, width), nn.ReLU())
        seen = joint + 2 * text_width + width + pooled_width
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

    def judge(self, latents: Tensor, text: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> Judgement:
        """Reads a batch. Most of them are safe, and need no aim.

        Args:
            latents: [batch, channels, height, width], as the denoiser gets them.
            text: [batch, tokens, text_width].
            timestep: 0..1000, [batch].
            pooled: [batch, pooled_width], if the network was made for one.
        """
        joint = torch.cat([self.latent_encoder(latents), self.time_encoder(sinusoidal(timestep, TIME_WIDTH).to(latents))], dim=-1)
        tokens = self.prompt_norm(text)
        mean = tokens.mean(1)
        attended, _ = self.attention(self.query(joint)[:, None], tokens, tokens, need_weights=False)
        attended = self.attention_norm(attended[:, 0] + mean)
        extra = [] if self.pooled is None or pooled is None else [pooled]
        strongest = self.evidence(tokens).amax(1)  # one token is enough to make a prompt unsafe, whatever the others say
        seen = torch.cat([joint, mean, attended, strongest, *extra], dim=-1)
        return Judgement(self.classifier(seen), (tokens, torch.cat([joint, attended], dim=-1), seen))

    def aim(self, features: tuple[Tensor, ...]) -> Aim:
        """Where the tokens should go, from a judgement's features."""
        tokens, around, seen = features
        length, width = tokens.shape[1:]
        placed = tokens + sinusoidal(torch.arange(length, device=tokens.device), width).to(tokens)
        context, _ = self.context(placed, placed, placed, need_weights=False)
        mask = self.mask(torch.cat([tokens, context], dim=-1))[..., 0].sigmoid()
        delta = self.delta(torch.cat([around[:, None].expand(-1, length, -1), tokens], dim=-1))
        moved = None
        if self.pooled is not None:
            wanted = self.pooled(seen)
            moved = wanted[:, :-1], wanted[:, -1:].sigmoid()
        return Aim(delta, mask, self.alpha(placed).sigmoid(), moved)

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Aim]:
        """Logits and aim, for training."""
        judged = self.judge(latents, text, timestep, pooled)
        return judged.logits, self.aim(judged.features)


def redirect(embedding: Tensor, ways: Sequence[tuple[Tensor, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """P + s · strength ⊙ Δ/‖Δ‖ ⊙ ‖p‖, for one concept or several.

    What one concept takes of an embedding's strength is not left for the next, so that none is moved by more than s times its norm.

    Args:
        embedding: p, [..., width].
        ways: per concept, the most important first: Δ [..., width] and strength [..., 1] in 0..1.
        scale: s.

    Returns:
        The redirected embedding, and the strength used up, [..., 1].
    """
    norm, moved, used = embedding.norm(dim=-1, keepdim=True), embedding, torch.zeros_like(embedding[..., :1])
    for delta, strength in ways:
        share = strength.to(embedding) * (1 - used)
        moved, used = moved + scale * share * normalize(delta.float(), dim=-1).to(embedding) * norm, used + share
    return moved, used


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
