"""Sparse autoencoders of activations: an encoder that stays as it was learned, and decoders that may be exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sparsity = Literal["threshold", "topk", "batch"]


class Features(NamedTuple):
    """What an encoder found in tokens."""

    values: Tensor
    """z, [..., latents], mostly zero."""
    before: Tensor
    """ReLU(W_enc (x - b_pre) + b_enc), [..., latents], before the sparsity."""


class Decoder(nn.Module):
    """x̂ = z W_dec + b_dec."""

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(latents, width), dim=1))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor) -> Tensor:
        """Features [..., latents] as activations [..., width]."""
        return values @ self.weight + self.bias


class SAE(nn.Module):
    """z = BatchTopK(ReLU(W_enc (x - b_pre) + b_enc), k), x̂ = z W_dec + b_dec, with rows of W_dec of unit norm.

    BatchTopK (Bussmann et al., 2024, https://arxiv.org/abs/2412.06410). `b_pre` belongs to the encoder and freezes with it, `b_dec` to the
    decoder: with one bias for both, adapting the decoder would change what the encoder says. Inputs are divided by `scale`, and with
    an orthonormal `basis` [full width, width] only their part in its span is looked at; what lies outside passes every edit unchanged.
    """

    def __init__(self, width: int, latents: int, k: int = 32, *, full_width: int | None = None) -> None:
        """Random weights: W_dec of unit rows, W_enc its transpose.

        Raises:
            ValueError: if k is not between 1 and the number of latents, or the basis is wider than what it spans.
        """
        super().__init__()
        if not 1 <= k <= latents:
            raise ValueError(f"k = {k} features of {latents} can't be active; choose k between 1 and {latents}")
        if full_width is not None and full_width < width:
            raise ValueError(f"{width} directions don't fit into a width of {full_width}")
        self.width, self.latents, self.k, self.full_width = width, latents, k, full_width
        self.decoder = Decoder(latents, width)
        self.encoder = nn.Linear(width, latents)
        self.b_pre = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.encoder.weight.copy_(self.decoder.weight)
            self.encoder.bias.zero_()
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("basis", None if full_width is None else torch.eye(full_width, width))
        self.threshold: Tensor
        self.scale: Tensor
        self.basis: Tensor | None

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make a network of this shape."""
        return {"width": self.width, "latents": self.latents, "k": self.k, "full_width": self.full_width}

    @property
    def token_width(self) -> int:
        """The width of the tokens it takes."""
        return self.full_width or self.width

    def inward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., token width] as the encoder sees them, [..., width]."""
        reduced = tokens if self.basis is None else tokens @ self.basis
        return reduced / self.scale

    def outward(self, change: Tensor) -> Tensor:
        """A change of what the encoder sees as a change of tokens, [..., token width]."""
        full = change if self.basis is None else change @ self.basis.T
        return full * self.scale

    def features(self, seen: Tensor, sparsity: Sparsity = "threshold") -> Features:
        """E(x): what is active in what the encoder sees [..., width].

        Args:
            seen: from `inward`.
            sparsity: `threshold` (inference: each feature on its own), `topk` (k per token), `batch` (k per token on average; training).
        """
        before = F.relu(self.encoder(seen - self.b_pre))
        if sparsity == "threshold":
            return Features(before * (before > self.threshold), before)
        if sparsity == "topk":
            top = before.topk(self.k, dim=-1)
            return Features(torch.zeros_like(before).scatter(-1, top.indices, top.values), before)
        return Features(before * (before >= batch_threshold(before, self.k)), before)

    def some(self, seen: Tensor, chosen: Tensor) -> Tensor:
        """Some features under `threshold` only, at their share of the cost: [..., chosen]."""
        before = F.relu(F.linear(seen - self.b_pre, self.encoder.weight[chosen], self.encoder.bias[chosen]))
        return before * (before > self.threshold)

    def forward(self, tokens: Tensor, sparsity: Sparsity = "threshold") -> Tensor:
        """Tokens, reconstructed: what lies outside of the basis is left out."""
        return self.outward(self.decoder(self.features(self.inward(tokens), sparsity).values))

    def frozen(self) -> Mapping[str, Tensor]:
        """What a transfer must not change."""
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("decoder.")}
        return {name: value for name, value in own.items() if value is not None}


def batch_threshold(before: Tensor, k: int) -> Tensor:
    """The least of the k · tokens largest pre-activations of a batch; zeros are never kept."""
    flat = before.flatten()
    kept = min(k * (before.numel() // before.shape[-1]), flat.numel())
    return flat.kthvalue(flat.numel() - kept + 1).values.clamp_min(torch.finfo(before.dtype).tiny)


def fraction_of_variance_unexplained(tokens: Tensor, reconstructed: Tensor) -> Tensor:
    """FVU: squared error by the squared distance from the mean, both [tokens, width]."""
    return (tokens - reconstructed).square().sum() / (tokens - tokens.mean(0)).square().sum().clamp_min(1e-12)


@torch.no_grad()
def geometric_median(tokens: Tensor, rounds: int = 50, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to all tokens, [width], by Weiszfeld's algorithm."""
    median = tokens.mean(0)
    for _ in range(rounds):
        weights = 1 / (tokens - median).norm(dim=1).clamp_min(1e-8)
        moved = (tokens * weights[:, None]).sum(0) / weights.sum()
        if (moved - median).norm() <= tolerance * median.norm().clamp_min(1e-12):
            return moved
        median = moved
    return median


@torch.no_grad()
def principal_basis(tokens: Tensor, width: int) -> Tensor:
    """The `width` orthonormal directions of most variance, [full width, width]."""
    centred = (tokens - tokens.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, -width:].flip(1).to(tokens.dtype).contiguous()
