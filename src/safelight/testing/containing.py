"""A detector for tests: it flags prompts that contain a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..detector import Detector


@dataclass(kw_only=True, eq=False)
class Containing(Detector[str]):
    """Flags prompts that contain `word`, so that a test decides which rows of a batch are flagged."""

    word: str = "knife"
    """What makes a prompt unsafe."""

    def __call__(self, items: Sequence[str]) -> Tensor:
        """1 where the word occurs, else 0, [batch]."""
        return torch.tensor([float(self.word in item.split()) for item in items])
