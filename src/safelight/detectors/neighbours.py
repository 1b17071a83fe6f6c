"""Nearest neighbours in a bank of known safe and unsafe prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Self

import torch
from annotated_types import Ge
from torch import Tensor

from ..bank import Bank, Encoder, embed_all
from ..calibration import Calibration
from ..detector import Context, Detector, Verdict


@dataclass(kw_only=True, eq=False)
class Neighbours(Detector[str]):
    """A distance-weighted vote of the k nearest prompts in a bank (Vice et al., 2024, https://arxiv.org/abs/2411.13982).

    Embeddings come from `encoder`, or else from the text encoder of the pipeline that the detector works in.
    """

    bank: Bank = field(metadata={"artefact": "bank"})
    """What is known."""
    k: Annotated[int, Ge(1)] = 5
    """How many neighbours vote."""
    temperature: Annotated[float, Ge(1e-4)] = 0.05
    """How fast a vote loses weight with cosine distance."""
    encoder: Encoder | None = field(default=None, metadata={"artefact": "encoder"})
    """What embeds prompts."""
    threshold: float = 0.5
    """Score above which a prompt is unsafe; set by the bank's calibration where it has one."""
    calibration: Calibration | None = field(default=None, metadata={"artefact": "bank"})

    def __post_init__(self) -> None:
        if self.calibration is None and self.bank.calibration is not None and self.threshold == 0.5:
            self.calibration, self.threshold = self.bank.calibration, self.bank.calibration.threshold

    def within(self, context: Context) -> Self:
        """Uses the pipeline's text encoder, unless the detector has its own.

        Raises:
            ArtefactError: if the bank was made with another encoder.
        """
        if self.encoder is not None:
            return self
        bound = copy.copy(self)
        bound.encoder = context.pool
        self.bank.check(bound.encoder)
        return bound

    def __call__(self, items: Sequence[str]) -> Tensor:
        """The share of unsafe votes, [batch]."""
        return self._votes(items)[:, 1:].sum(dim=1)

    def verdicts(self, items: Sequence[str]) -> list[Verdict]:
        """Scores with the category that got most votes."""
        votes = self._votes(items)  # [batch, 1 + categories]
        scores, concepts = votes[:, 1:].sum(dim=1).tolist(), votes[:, 1:].argmax(dim=1).tolist()
        return [
            Verdict(score, self.threshold, score > self.threshold, self.bank.categories[concept] if score > self.threshold else None)
            for score, concept in zip(scores, concepts, strict=True)
        ]

    def _votes(self, items: Sequence[str]) -> Tensor:
        if self.encoder is None:
            raise ValueError("this detector has no encoder of its own; use it in a guarded pipeline, or give it one")
        likeness = embed_all(self.encoder, items) @ self.bank.embeddings.T  # [batch, entries]
        nearest = likeness.topk(min(self.k, likeness.shape[1]), dim=1)
        weights = (nearest.values / self.temperature).softmax(dim=1)
        votes = torch.zeros(len(items), 1 + len(self.bank.categories))
        return votes.scatter_add_(1, self.bank.labels[nearest.indices], weights)
