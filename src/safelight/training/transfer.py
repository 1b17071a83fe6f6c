"""A decoder, adapted to a new domain while its encoder stays as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..nets.sae import SAE, Decoder


@dataclass(frozen=True)
class TransferConfig:
    """How a decoder is adapted."""

    objective: Literal["repair", "reconstruct"] = "repair"
    """What unsafe activations are to be decoded as: those of their safe twins, or (as published) themselves."""
    closeness: float = 1e-3
    """μ: what keeps W_dec close to the source's; published: 0.01."""
    replay: float = 0.2
    """The weight of source activations."""


@dataclass(frozen=True)
class Domain:
    """Paired activations of one domain, [tokens, token width] each; row by row at the same place, step and seed."""

    unsafe: Tensor
    safe: Tensor


@torch.no_grad()
def adapt(sae: SAE, start: Decoder, target: Domain, source: Domain | None, config: TransferConfig) -> Decoder:
    """The decoder that minimises ‖y - D(E(a))‖² + μ ‖W_dec - W_start‖² on the target, with replay of the source.

    With a frozen encoder this is a linear problem, and it is solved exactly instead of by a few steps of Adam.

    Raises:
        ValueError: if the target is empty, or its members do not differ.
    """
    if not len(target.unsafe):
        raise ValueError("the target domain is empty; give at least a few pairs of it")
    if torch.equal(target.unsafe, target.safe):
        raise ValueError("the members of the target's pairs have the same activations; give pairs that differ in what is unsafe")
    moments = _Moments(sae, start)
    moments.add(target, config.objective, 1.0 if source is None else 1 - config.replay)
    if source is not None and config.replay:
        moments.add(source, config.objective, config.replay)
    return moments.solve(config.closeness)


class _Moments:
    """Weighted first and second moments of features and of what the starting decoder misses."""

    def __init__(self, sae: SAE, start: Decoder) -> None:
        self.sae, self.start = sae, start
        self.weight = 0.0
        shapes = {"z": (sae.latents,), "r": (sae.width,), "zz": (sae.latents, sae.latents), "zr": (sae.latents, sae.width)}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=sae.b_pre.device) for name, shape in shapes.items()}

    def add(self, domain: Domain, objective: str, share: float) -> None:
        """Both members of a domain, which together weigh `share`."""
        each = share / (2 * len(domain.safe))
        goals = (domain.safe if objective == "repair" else domain.unsafe, domain.safe)
        for tokens, goal in zip((domain.unsafe, domain.safe), goals, strict=True):
            for own, wanted in zip(tokens.split(16_384), goal.split(16_384), strict=True):
                self._add(own.to(self.sae.b_pre), wanted.to(self.sae.b_pre), each)

    def _add(self, tokens: Tensor, wanted: Tensor, each: float) -> None:
        values = self.sae.features(self.sae.inward(tokens)).values
        missed = self.sae.inward(wanted) - self.start(values)
        self.weight += each * len(tokens)
        self.sums["z"] += each * values.sum(0)
        self.sums["r"] += each * missed.sum(0)
        self.sums["zz"] += each * (values.T @ values)
        self.sums["zr"] += each * (values.T @ missed)

    def solve(self, closeness: float) -> Decoder:
        """W = W_start + (Cov(z) + μ)⁻¹ Cov(z, missed); the bias takes what is left of the mean."""
        z, r = self.sums["z"] / self.weight, self.sums["r"] / self.weight
        covariance = self.sums["zz"] / self.weight - torch.outer(z, z)
        covariance.diagonal().add_(closeness)
        change = torch.cholesky_solve(self.sums["zr"] / self.weight - torch.outer(z, r), torch.linalg.cholesky(covariance))
        adapted = Decoder(self.sae.latents, self.sae.width).to(self.sae.b_pre.device)
        adapted.weight.copy_(self.start.weight + change.float())
        adapted.bias.copy_(self.start.bias + (r - z @ change).float())
        return adapted.eval().requires_grad_(False)
