"""Nearest neighbours in a bank of known safe and unsafe prompts."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Self

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from ..bank import PROBES, Bank, Encoder, embed_all
from ..calibration import Calibration
from ..detector import Context, Detector, Verdict, exceeds

TYPICAL = 0.1
"""With the default temperature of 0.05, a neighbour at this squared distance has lost a factor of e."""

FAINT = 1e-4
"""A share of votes that counts as none, where the threshold is 0."""


@dataclass(kw_only=True, eq=False)
class Neighbours(Detector[str]):
    """A distance-weighted vote of the k nearest prompts in a bank, in the bank's metric (Vice et al., 2024, https://arxiv.org/abs/2411.13982).

    Embeddings come from `encoder`, or else from the text encoder of the pipeline that the detector works in.
    """

    bank: Bank = field(metadata={"artefact": "bank"})
    """What is known."""
    k: Annotated[int, Ge(1)] = 5
    """How many neighbours vote."""
    temperature: Annotated[float, Ge(1e-4)] = 0.05
    """How fast a vote loses weight: by a factor of e for each `temperature` of distance (1 - cosine, or its like in a learned metric)."""
    encoder: Encoder | None = field(default=None, metadata={"artefact": "encoder"})
    """What embeds prompts."""
    threshold: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    """Score above which a prompt is unsafe; set by the bank's calibration where it has one."""
    calibration: Calibration | None = field(default=None, metadata={"artefact": "bank"})

    def __post_init__(self) -> None:
        if self.calibration is None and self.bank.calibration is not None and self.threshold == 0.5:
            self.calibration, self.threshold = self.bank.calibration, self.bank.calibration.threshold

    @property
    def reads_tokens(self) -> bool:
        return self.encoder is None

    def within(self, context: Context) -> Self:
        """Uses the pipeline's text encoder, unless the detector has its own."""
        if self.encoder is not None:
            return self
        bound = copy.copy(self)
        bound.encoder = context.pool
        return bound

    def __call__(self, items: Sequence[str]) -> Tensor:
        """The share of unsafe votes, [batch].

        Raises:
            ValueError: if there is no encoder, or an embedding is not finite.
            ArtefactError: if the bank was made with another encoder.
        """
        return self._votes(items)[:, 1:].sum(dim=1).clamp(max=1)  # rounding must not decide about a threshold of 1

    def verdicts(self, items: Sequence[str]) -> list[Verdict]:
        """Scores with the category that got most votes."""
        votes = self._votes(items)  # [batch, 1 + categories]
        scores, concepts = votes[:, 1:].sum(dim=1).clamp(max=1).tolist(), votes[:, 1:].argmax(dim=1).tolist()
        return [
            Verdict(
                score,
                self.threshold,
                exceeds(score, self.threshold),
                self.bank.categories[concept] if exceeds(score, self.threshold) else None,
            )
            for score, concept in zip(scores, concepts, strict=True)
        ]

    def margins(self, items: Sequence[str], verdicts: Sequence[Verdict]) -> Tensor:
        """The log odds of unsafe votes above those of the threshold, with their gradient, [batch].

        All entries vote: among the k nearest alone the vote is mostly unanimous, and flat.
        """
        assert self.encoder is not None
        distances = self.bank.distances(embed_all(self.encoder, items, graph=True))  # [batch, entries]
        nearest = distances.topk(min(self.k, distances.shape[1]), dim=1, largest=False).values
        votes = -distances / (2 * self.temperature * self._scale(nearest))
        unsafe, safe = (votes.masked_fill(~chosen, -torch.inf).logsumexp(dim=1) for chosen in (self.bank.labels > 0, self.bank.labels == 0))
        return unsafe - safe - math.log(max(self.threshold, FAINT) / (1 - self.threshold))

    def _votes(self, items: Sequence[str]) -> Tensor:
        """Each item's share of votes for safe and for each category, [batch, 1 + categories]."""
        if self.encoder is None:
            raise ValueError("this detector has no encoder of its own; use it in a guarded pipeline, or give it one (`encoder=`)")
        votes = torch.zeros(len(items), 1 + len(self.bank.categories))
        if not items:
            return votes
        embeddings = embed_all(self.encoder, [*PROBES, *items])  # in one go: the encoder must be the bank's, each time
        self.bank.check_probes(embeddings[: len(PROBES)])
        distances = self.bank.distances(embeddings[len(PROBES) :])  # [batch, entries]
        nearest = distances.topk(min(self.k, distances.shape[1]), dim=1, largest=False)
        weights = (-nearest.values / (2 * self.temperature * self._scale(nearest.values))).softmax(dim=1)
        return votes.scatter_add_(1, self.bank.labels[nearest.indices], weights)

    def _scale(self, nearest: Tensor) -> Tensor | float:
        """The unit of squared distances [batch, k]: 1 for cosine.

        A learned metric has no unit of its own, and stretches outliers; there, each item's neighbours have a median squared
        distance of `TYPICAL`.
        """
        if self.bank.projection is None:
            return 1.0
        return nearest.median(dim=1, keepdim=True).values.clamp_min(1e-12) / TYPICAL
