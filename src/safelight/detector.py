"""Prompt or image -> risk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from .calibration import Calibration

Item = TypeVar("Item", contravariant=True)


@dataclass(frozen=True)
class Verdict:
    """What a detector says of one item."""

    score: float
    """Risk, 0 safe … 1 unsafe."""
    threshold: float
    flagged: bool
    concept: str | None = None
    """What was found, if the detector tells."""
    safe_prompt: str | None = None
    """A safe prompt to use instead, if the detector proposes one."""
    note: str | None = None
    """Anything a reader of the record should know, for instance that the detector failed and the item was flagged for it."""


class Context(Protocol):
    """What a detector may ask of the generation it works in."""

    def pool(self, prompts: Sequence[str]) -> Tensor:
        """The pipeline's own pooled embeddings, [batch, width]."""
        ...


class Detector(Generic[Item]):
    """Scores items; those above the threshold are unsafe. Subclasses define `__call__`."""

    threshold: float = 0.5
    concept: str | None = None
    calibration: Calibration | None = None
    reads: Literal["prompt", "picture"] = "prompt"
    """What its items are; a picture is [height, width, 3] in 0..255."""

    @property
    def reads_tokens(self) -> bool:
        """Whether it sees a prompt's tokens as the pipeline's text encoders do, those of textual inversions too; else it sees words."""
        return False

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Scores [batch], 0 safe … 1 unsafe."""
        raise NotImplementedError

    def within(self, context: Context) -> Self:
        """This detector, ready to work inside a generation (with the pipeline's own text encoder, say)."""
        return self

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item."""
        scores = [float(score) for score in self(items)]
        if len(scores) != len(items):
            raise ValueError(f"{type(self).__name__} gave {len(scores)} scores for {len(items)} items")
        return [Verdict(score, self.threshold, exceeds(score, self.threshold), self.concept) for score in scores]

    def margins(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Tensor:
        """By how much each item's score exceeds the threshold, [batch]: what an attack through the guard follows.

        Subclasses that know its gradient return it on any scale of which 0 is the limit; by default it has none.
        """
        return torch.tensor([verdict.score - verdict.threshold for verdict in verdicts])

    def calibrate(self, benign: Sequence[Item], target_fpr: float = 0.01, confidence: float = 0.95) -> Calibration:
        """Sets the threshold so that at most `target_fpr` of benign items are flagged, with `confidence`.

        Raises:
            ValueError: if that takes a threshold that no score exceeds: the detector would be off, and look on.
        """
        calibration = Calibration.fit([float(score) for score in self(benign)], target_fpr, confidence, items=benign)
        if calibration.threshold >= 1:
            raise ValueError(
                f"too many benign items get the highest score for a false-positive rate of {target_fpr:g}: the detector would never flag "
                "anything; allow more false positives, or use finer scores (more neighbours, say)"
            )
        self.calibration, self.threshold = calibration, calibration.threshold
        return calibration


def exceeds(score: float, threshold: float) -> bool:
    """Whether a score is above the threshold; so is one that can't be compared (NaN)."""
    return not score <= threshold


def highest(verdicts: Sequence[Verdict]) -> Verdict:
    """The most alarming of several verdicts on one item."""
    return max(verdicts, key=lambda verdict: (verdict.flagged, verdict.score))


@dataclass
class Forced(Detector[Any]):
    """Flags everything: shows what a method does when it is made to act (`sadi_delta_p_forced`)."""

    detector: Detector[Any]

    def __post_init__(self) -> None:
        self.threshold, self.reads = self.detector.threshold, self.detector.reads

    def __call__(self, items: Sequence[Any]) -> Tensor:
        return self.detector(items)

    def within(self, context: Context) -> Forced:
        return replace(self, detector=self.detector.within(context))

    def verdicts(self, items: Sequence[Any]) -> list[Verdict]:
        return [replace(verdict, flagged=True, note="forced") for verdict in self.detector.verdicts(items)]
