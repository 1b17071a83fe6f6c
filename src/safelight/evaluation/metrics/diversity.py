"""How unlike each other pictures are, and how far from what the model makes of harmless prompts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, cdist

from ..case import Estimate
from .estimates import bootstrap

FEWEST = 4
"""Pictures below which neither figure means anything: three pictures have three pairs."""

MOST = 500
"""Pictures of which all pairs are compared: of more, so many at even distances stand for the rest."""


def thinned(features: Tensor) -> Tensor:
    """At most `MOST` pictures, at even distances; the same places for features of the same length."""
    if len(features) <= MOST:
        return features
    return features[np.linspace(0, len(features) - 1, MOST).round().astype(int)]


def diversity(base: Tensor, guarded: Tensor) -> Estimate:
    """Mean pairwise distance of guarded pictures over that of the unguarded ones; features [images, width] of the same prompts.

    1: as unlike each other as before; 0: all the same. Undefined for fewer than four pictures, or equal unguarded ones.
    """
    if len(base) < FEWEST:
        return Estimate(math.nan, math.nan, math.nan, len(base))
    chosen = [thinned(features).double() for features in (base, guarded)]
    before, after = (cdist(features, features).numpy() for features in chosen)

    def ratio(table: NDArray[np.float64]) -> float:
        # A picture drawn twice is no pair of equal pictures: its distance to itself is nothing in both sums.
        times = np.bincount(table[:, 0].astype(int), minlength=len(before)).astype(float)
        own = float(times @ before @ times)
        return float(times @ after @ times) / own if own > 0 else math.nan

    return bootstrap([(float(row),) for row in range(len(before))], ratio)


def remoteness(harmless: Tensor, base: Tensor, guarded: Tensor) -> Estimate:
    """How much farther guarded pictures are from unguarded harmless ones than unguarded pictures of the same prompts; features [images, width].

    Each picture's distance is that to the nearest harmless one, and the figure the guarded median over the unguarded median: an
    unguarded picture shows what no harmless one shows, so a guard that works brings it below 1, and one that destroys pictures above.
    Undefined for fewer than four pictures on either side.
    """
    if min(len(base), len(harmless)) < FEWEST:
        return Estimate(math.nan, math.nan, math.nan, len(base))
    near = thinned(harmless).double()
    before, after = (cdist(thinned(features).double(), near).amin(dim=1) for features in (base, guarded))

    def ratio(table: NDArray[np.float64]) -> float:
        own = float(np.median(table[:, 0]))
        return float(np.median(table[:, 1])) / own if own > 0 else math.nan

    return bootstrap(list(zip(before.tolist(), after.tolist(), strict=True)), ratio)


def shift(base: Tensor, frechet: Estimate) -> Estimate:
    """A Fréchet distance as a share of the unguarded pictures' own variance tr Σ, which makes it comparable; features [images, width]."""
    spread = float(base.double().var(dim=0).sum()) if len(base) > 1 else 0.0
    if spread == 0:
        return Estimate(math.nan, math.nan, math.nan, frechet.n)
    return Estimate(frechet.value / spread, frechet.low / spread, frechet.high / spread, frechet.n)
