"""What a diagnosis looks at: the pictures of a part, prompt by prompt, guarded beside unguarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..case import Outcome
from ..metrics.blank import is_blank


@dataclass(frozen=True)
class Evidence:
    """One part of a run; all fields are in the order of `cases`."""

    cases: Sequence[str]
    """Their ids."""
    base: Tensor
    """A judge's features of the unguarded pictures, [cases, width]."""
    guarded: Tensor
    """The same of the guarded ones."""
    records: Sequence[dict[str, Any]]
    """What the guard says that it did."""
    identical: Sequence[bool]
    """Whether both pictures are the same, bit by bit."""
    blank_base: Sequence[bool]
    blank: Sequence[bool]
    """Whether the picture is one plain colour, unguarded and guarded."""
    unsafe: Sequence[bool]
    """Whether any judge sees something unsafe in the guarded picture."""
    lost: Sequence[float]
    """The share of the prompt's harmless content that is lost, by the judge that thinks least of the guard; 0 where there was none."""

    @property
    def flagged(self) -> list[bool]:
        """Whether the guard's record says that it found the request unsafe."""
        return [bool(record.get("flagged")) for record in self.records]

    @property
    def detects(self) -> bool:
        """Whether the guard tells requests apart at all: a method without a detector flags nothing, and misses nothing."""
        actions = [action for record in self.records for action in record.get("actions", ())]
        return any(action.get("flagged") or action.get("threshold") is not None for action in actions)

    @property
    def methods(self) -> list[str]:
        """The methods that acted, outermost first."""
        return list(dict.fromkeys(action["method"] for record in self.records for action in record.get("actions", ())))

    @property
    def treated(self) -> list[int]:
        """Where the guard was to act: at flagged prompts, or everywhere if it has no detector."""
        return [index for index, flagged in enumerate(self.flagged) if flagged or not self.detects]

    def among(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The features of some cases, unguarded and guarded."""
        return self.base[list(chosen)], self.guarded[list(chosen)]


def gather(
    base: Sequence[Outcome], guarded: Sequence[Outcome], pictures: Sequence[Sequence[Any]], features: tuple[Tensor, Tensor],
    unsafe: Sequence[bool] | None = None, lost: Sequence[float] | None = None,
) -> Evidence:  # fmt: skip
    """Evidence from the outcomes of two arms, with their pictures and features; without judgements nothing counts as unsafe or lost.

    Raises:
        ValueError: if the arms are not of the same cases in the same order.
    """
    cases = [outcome.case for outcome in base]
    if cases != [outcome.case for outcome in guarded]:
        raise ValueError("the two arms hold different cases, or in another order; give the outcomes of the same prompts")
    return Evidence(
        cases, features[0], features[1], [outcome.record or {} for outcome in guarded],
        [before.sha256 == after.sha256 for before, after in zip(base, guarded, strict=True)],
        [is_blank(picture) for picture in pictures[0]], [is_blank(picture) for picture in pictures[1]],
        unsafe if unsafe is not None else [False] * len(cases), lost if lost is not None else [0.0] * len(cases),
    )  # fmt: skip


def pooled(parts: Sequence[Evidence]) -> Tensor:
    """The unguarded pictures' features of several parts, [images, width]."""
    return torch.cat([part.base for part in parts])
