"""Thresholds with a guarantee."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Calibration:
    """A threshold, and how sure one may be of its false-positive rate."""

    threshold: float
    n: int
    """Benign items it was fitted on."""
    flagged: int
    """How many of them are above the threshold."""
    bound: float
    """With `confidence`, the true false-positive rate is at most this (Clopper–Pearson)."""
    target_fpr: float
    confidence: float
    data: str = ""
    """SHA-256 of the benign items."""

    @classmethod
    def fit(cls, scores: Sequence[float], target_fpr: float = 0.01, confidence: float = 0.95, items: Sequence[Any] = ()) -> Self:
        """The smallest threshold whose false-positive rate is below the target with the given confidence.

        The threshold is an order statistic, so the bound holds although it was chosen on the same scores.

        Raises:
            ValueError: if a score is not finite, or there are too few of them for this target.
        """
        if not all(math.isfinite(score) for score in scores):
            raise ValueError("benign scores contain NaN or infinity; check the detector's embeddings")
        ordered = sorted(scores, reverse=True)
        allowed = [k for k in range(len(ordered)) if upper_bound(k, len(ordered), confidence) <= target_fpr]
        if not allowed:
            needed = math.ceil(math.log(1 - confidence) / math.log(1 - target_fpr))
            raise ValueError(
                f"{len(ordered)} benign items can't show a false-positive rate of {target_fpr:g} with {confidence:.0%} "
                f"confidence; give at least {needed}, or a higher target"
            )
        threshold = ordered[allowed[-1]]
        above = sum(score > threshold for score in ordered)
        data = hashlib.sha256("\0".join(map(str, items)).encode()).hexdigest()[:16]
        return cls(threshold, len(ordered), above, upper_bound(above, len(ordered), confidence), target_fpr, confidence, data)

    def __str__(self) -> str:
        return (
            f"threshold {self.threshold:.4g}: {self.flagged} of {self.n} benign items flagged; "
            f"false-positive rate ≤ {self.bound:.2%} with {self.confidence:.0%} confidence"
        )

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.__dict__)


def upper_bound(events: int, n: int, confidence: float = 0.95) -> float:
    """The one-sided Clopper–Pearson bound on a rate after `events` in `n` trials."""
    from scipy.stats import beta  # a third of a second to import, for one function that only calibration needs

    return 1.0 if events >= n else float(beta.ppf(confidence, events + 1, n - events))
