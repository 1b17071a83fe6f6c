"""Thresholds with a guarantee."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from .files import Facts


@dataclass(frozen=True)
class Calibration:
    """A threshold, and how sure one may be of its false-positive rate."""

    threshold: float
    n: int
    """Benign items it was fitted on."""
    flagged: int
    """How many of them are above the threshold."""
    bound: float
    """With `confidence`, the true false-positive rate is at most this (Clopper–Pearson).

    It counts the items that were allowed above the threshold: more than `flagged` where scores are tied, as the number of tied scores
    depends on the threshold that was chosen.
    """
    target_fpr: float
    confidence: float
    data: str = ""
    """SHA-256 of the benign items."""

    @classmethod
    def fit(cls, scores: Sequence[float], target_fpr: float = 0.01, confidence: float = 0.95, items: Sequence[Any] = ()) -> Self:
        """The smallest threshold whose false-positive rate is below the target with the given confidence.

        The threshold is an order statistic, so the bound holds although it was chosen on the same scores.

        Raises:
            ValueError: if a score is not finite, there are too few of them for this target, or target or confidence is no share.
        """
        if not (0 < target_fpr < 1 and 0 < confidence < 1):
            raise ValueError(f"target_fpr and confidence are shares between 0 and 1, not {target_fpr} and {confidence}")
        if not all(math.isfinite(score) for score in scores):
            raise ValueError("benign scores contain NaN or infinity; check the detector's embeddings")
        ordered = sorted(scores, reverse=True)
        allowed = -1
        while allowed + 1 < len(ordered) and upper_bound(allowed + 1, len(ordered), confidence) <= target_fpr:
            allowed += 1
        if allowed < 0:
            raise ValueError(
                f"{len(ordered)} benign items can't show a false-positive rate of {target_fpr:g} with {confidence:.0%} "
                f"confidence; give at least {items_needed(target_fpr, confidence)}, or a higher target"
            )
        threshold = ordered[allowed]
        above = sum(score > threshold for score in ordered)
        data = hashlib.sha256("\0".join(map(str, items)).encode()).hexdigest()[:16]
        return cls(threshold, len(ordered), above, upper_bound(allowed, len(ordered), confidence), target_fpr, confidence, data)

    @classmethod
    def read(cls, facts: Facts, name: str = "calibration") -> Self | None:
        """The calibration among an artefact's facts; None where there is none.

        Raises:
            ArtefactError: if it is none.
        """
        if facts.get(name) is None:
            return None
        own = Facts(facts.mapping(name), f"{facts.where}, {name}", facts.remedy)
        own.only([field.name for field in fields(cls)])
        data = own.known.get("data", "")
        if not isinstance(data, str):
            raise own.error(f"has data={data!r}, which is no hash")
        counts = {key: own.integer(key, 0, 1 << 48) for key in ("n", "flagged")}
        return cls(threshold=own.number("threshold"), bound=own.number("bound", 0, 1), target_fpr=own.number("target_fpr", 0, 1),
                   confidence=own.number("confidence", 0, 1), data=data, **counts)  # fmt: skip

    def towards(self, weakest: float, margin: float, scores: Sequence[float]) -> Self:
        """With a higher threshold, if unsafe items leave room: a higher one flags no more benign items, so the bound still holds.

        Args:
            weakest: what nearly all unsafe items exceed; below the threshold, nothing changes.
            margin: how far to go there, 0 … 1.
            scores: of the benign items, to count them again.
        """
        threshold = self.threshold + margin * max(0.0, weakest - self.threshold)
        return replace(self, threshold=threshold, flagged=sum(score > threshold for score in scores))

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


def items_needed(target_fpr: float, confidence: float = 0.95) -> int:
    """How many benign items, none of them flagged, show that the false-positive rate is below the target."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - target_fpr))
