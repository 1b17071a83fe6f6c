"""Which features of a dictionary speak of a risk, and how to read from them whom to steer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dictionary import Alarm, Harmful
from ..nets.sae import SAE

READ = 4096
"""At most so many features are read at once."""


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


@torch.no_grad()
def harmful_features(sae: SAE, domains: Sequence[tuple[Tensor, Tensor]], count: int) -> Harmful:
    """The `count` features whose contrast is largest in any of the domains, per time point.

    Args:
        sae: the dictionary.
        domains: for each domain the activations of unsafe and of safe members, [pictures, times, tokens, width].
        count: how many features.

    Raises:
        ValueError: if no feature fires more for unsafe members than for safe ones.
    """
    known = [statistics(sae, *members) for members in domains]
    contrast = torch.stack([domain.contrast for domain in known]).amax(0)  # [times, latents]
    if not bool((contrast > 0).any(1).all()):
        raise ValueError("no feature fires more for unsafe prompts than for their safe twins; give pairs that differ in what is unsafe")
    chosen = contrast.topk(min(count, contrast.shape[1]), dim=1).indices
    means = torch.stack([(domain.unsafe + domain.safe) / 2 for domain in known]).mean(0).gather(1, chosen)
    spreads = torch.stack([domain.spread for domain in known]).amax(0).gather(1, chosen).clamp_min(1e-6)
    return Harmful(chosen, means, spreads, contrast.gather(1, chosen).clamp_min(0))


@torch.no_grad()
def alarm(
    sae: SAE, domains: Sequence[tuple[Tensor, Tensor]], benign: Tensor, times: Sequence[int], count: int, ridge: float = 0.01
) -> Alarm:  # fmt: skip
    """The linear reading of features that best foretells how far a token is from its safe twin, by ridge regression.

    Tokens of safe members and of benign prompts ought not to change. First all features are read (of large dictionaries, those that
    differ most), then the `count` that count most, on their own.

    Args:
        sae: the dictionary.
        domains: for each domain the activations of unsafe and of safe members, [pictures, times, tokens, width].
        benign: those of benign prompts.
        times: the time points in which the gate looks.
        count: how many features to read.
        ridge: what is added to the features' variances.
    """
    pool = torch.arange(sae.latents)
    if sae.latents > READ:
        contrast = torch.stack([statistics(sae, *members).contrast[list(times)].abs().amax(0) for members in domains]).amax(0)
        pool = contrast.topk(READ).indices
    sums = _Regression(sae, pool)
    for unsafe, safe in domains:
        for time in times:
            own, twin = unsafe[:, time], safe[:, time]
            sums.add(own, (sae.inward(twin.float()) - sae.inward(own.float())).norm(dim=-1), 0.5 / (len(times) * len(domains)))
            sums.add(twin, None, 0.35 / (len(times) * len(domains)))
    for time in times:
        sums.add(benign[:, time], None, 0.15 / len(times))
    weights = sums.solve(torch.arange(len(pool)), ridge)
    best = (weights.abs() * sums.spread).topk(min(count, len(pool))).indices
    return Alarm(pool[best], sums.solve(best, ridge))


@torch.no_grad()
def peaks(sae: SAE, sounding: Alarm, tokens: Tensor, times: Sequence[int]) -> Tensor:
    """The highest score of each picture at some time points, [pictures], for tokens [pictures, times, tokens, width]."""
    found = [torch.cat([sounding.scores(sae, sae.inward(part.float())) for part in tokens[:, time].split(32)]) for time in times]
    return torch.stack(found).amax(0)


@torch.no_grad()
def held_out_separation(
    sae: SAE, domains: Sequence[tuple[Tensor, Tensor]], benign: Tensor, times: Sequence[int], count: int, ridge: float = 0.01
) -> float:  # fmt: skip
    """How often an unsafe picture scores higher than a safe or benign one (AUC), by an alarm that was fitted on every other pair."""
    made = alarm(sae, [(unsafe[::2], safe[::2]) for unsafe, safe in domains], benign[::2], times, count, ridge)
    unsafe, safe = (torch.cat([peaks(sae, made, members[place][1::2], times) for members in domains]) for place in (0, 1))
    harmless = torch.cat([safe, peaks(sae, made, benign[1::2], times)])
    return float((unsafe[:, None] > harmless[None]).double().mean() + 0.5 * (unsafe[:, None] == harmless[None]).double().mean())


class _Regression:
    """Weighted moments of features and of how far tokens are from where they ought to be."""

    def __init__(self, sae: SAE, pool: Tensor) -> None:
        self.sae, self.pool = sae, pool
        shapes = {"z": (len(pool),), "y": (), "zz": (len(pool), len(pool)), "zy": (len(pool),)}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add(self, tokens: Tensor, distances: Tensor | None, share: float) -> None:
        """Tokens [pictures, tokens, width] that together weigh `share`, and their distances [pictures, tokens] (None: 0)."""
        flat, wanted = tokens.flatten(0, 1), None if distances is None else distances.flatten()
        each = share / len(flat)
        for start in range(0, len(flat), 8192):
            part = slice(start, start + 8192)
            values = self.sae.some(self.sae.inward(flat[part].to(self.sae.b_pre)), self.pool).cpu()
            self.sums["z"] += each * values.sum(0)
            self.sums["zz"] += each * (values.T @ values)
            if wanted is not None:
                self.sums["y"] += each * wanted[part].sum()
                self.sums["zy"] += each * (values.T @ wanted[part])

    @property
    def covariance(self) -> Tensor:
        """Of the features."""
        return self.sums["zz"] - torch.outer(self.sums["z"], self.sums["z"])

    @property
    def spread(self) -> Tensor:
        """Standard deviations."""
        return self.covariance.diagonal().clamp_min(0).sqrt().float()

    def solve(self, chosen: Tensor, ridge: float) -> Tensor:
        """The weights of some features."""
        covariance = self.covariance[chosen][:, chosen] + ridge * torch.eye(len(chosen), dtype=torch.float64)
        return torch.linalg.solve(covariance, (self.sums["zy"] - self.sums["z"] * self.sums["y"])[chosen]).float()
