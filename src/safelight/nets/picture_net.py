"""A tiny network that says which of some labels a small picture shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu


class PictureNet(nn.Module):
    """Depthwise separable convolutions, then the strongest response of each feature anywhere in the picture."""

    def __init__(self, labels: int, widths: Sequence[int] = (24, 48, 64, 64)) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"labels": labels, "widths": list(widths)}
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            _Separable(before, after, stride=2 if index < 2 else 1) for index, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.head = nn.Linear(widths[-1], labels)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [batch, labels] of pictures [batch, 3, height, width] in -1..1."""
        maps = silu(self.stem(pictures))
        for block in self.blocks:
            maps = block(maps)
        return self.head(maps.amax(dim=(2, 3)))


class _Separable(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(before, before, 5, stride=stride, padding=2, groups=before)
        self.mix = nn.Conv2d(before, after, 1)
        self.norm = nn.GroupNorm(4, after)

    def forward(self, maps: Tensor) -> Tensor:
        return silu(self.norm(self.mix(self.wide(maps))))
