"""Which features of a dictionary speak of a risk, and how far apart they keep unsafe pictures from safe ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dictionary import Harmful
from ..nets.sae import SAE


@dataclass(frozen=True)
class Statistics:
    """Per time point, of all tokens of one domain's pairs: [times, latents] each."""

    unsafe: Tensor
    """Means over the unsafe members."""
    safe: Tensor
    spread: Tensor
    """Standard deviations over both."""

    @property
    def contrast(self) -> Tensor:
        """Difference of the normalised means, unsafe - safe; 0 where a feature never fires."""
        return torch.where(self.spread > 1e-6, (self.unsafe - self.safe) / self.spread.clamp_min(1e-6), 0.0)


@torch.no_grad()
def statistics(sae: SAE, unsafe: Tensor, safe: Tensor) -> Statistics:
    """Of activations [pictures, times, tokens, width] of both members."""
    moments = [[_moments(sae, member[:, time].flatten(0, 1)) for time in range(member.shape[1])] for member in (unsafe, safe)]
    means = [torch.stack([mean for mean, _ in rows]) for rows in moments]
    squares = torch.stack([torch.stack([square for _, square in rows]) for rows in moments]).mean(0)
    variance = squares - ((means[0] + means[1]) / 2).square()
    return Statistics(means[0], means[1], variance.clamp_min(0).sqrt())


def _moments(sae: SAE, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each feature over tokens [tokens, width]."""
    total, square = torch.zeros(sae.latents), torch.zeros(sae.latents)
    for values in features_of(sae, tokens):
        total += values.sum(0).cpu()
        square += values.square().sum(0).cpu()
    return total / len(tokens), square / len(tokens)


def features_of(sae: SAE, tokens: Tensor, at_once: int = 8192) -> Iterator[Tensor]:
    """Features of tokens [tokens, token width], a part at a time."""
    for part in tokens.split(at_once):
        yield sae.features(sae.inward(part.to(sae.b_pre))).values


def harmful_features(domains: Sequence[Statistics], count: int) -> Harmful:
    """The `count` features whose contrast is largest in any of the domains, per time point.

    Raises:
        ValueError: if no feature fires more for unsafe members than for safe ones.
    """
    contrast = torch.stack([domain.contrast for domain in domains]).amax(0)  # [times, latents]
    if not bool((contrast > 0).any(1).all()):
        raise ValueError("no feature fires more for unsafe prompts than for their safe twins; give pairs that differ in what is unsafe")
    best = contrast.topk(min(count, contrast.shape[1]), dim=1)
    means = torch.stack([(domain.unsafe + domain.safe) / 2 for domain in domains]).mean(0)
    spreads = torch.stack([domain.spread for domain in domains]).amax(0)
    return Harmful(
        best.indices, means.gather(1, best.indices), spreads.gather(1, best.indices).clamp_min(1e-6), best.values.clamp_min(0),
    )  # fmt: skip
