"""What one probe has found in the images of a generation so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from .anchors import Anchors

Memory = Literal["union", "first", "latest"]


class Finds:
    """Masks, and what set them off, image by image."""

    def __init__(self, anchors: Anchors) -> None:
        self.anchors = anchors
        self.masks: dict[int, Tensor] = {}
        """Image -> [height, width]."""
        self.fired: dict[int, set[int]] = {}
        """Image -> the concepts whose τ was exceeded."""
        self.best: dict[int, tuple[float, float, str]] = {}
        """Image -> the score that exceeds its τ most (or falls short of it least), that τ, and the concept."""
        self.since: dict[int, int] = {}
        """Image -> how many looks came before the one that set the guard off."""
        self._looks: dict[int, int] = {}

    def see(self, image: int, peaks: Sequence[float], limits: Sequence[float]) -> None:
        """Takes in the highest score of each concept."""
        over = {concept for concept, (peak, limit) in enumerate(zip(peaks, limits, strict=True)) if peak > limit}
        self.fired[image] = self.fired.get(image, set()) | over
        if over:
            self.since.setdefault(image, self._looks.get(image, 0))
        self._looks[image] = self._looks.get(image, 0) + 1
        top = max(range(len(peaks)), key=lambda concept: peaks[concept] - limits[concept])
        if image not in self.best or peaks[top] - limits[top] > self.margin(image):
            self.best[image] = peaks[top], limits[top], self.anchors.concepts[top]

    def margin(self, image: int) -> float:
        """By how much the best score exceeds its τ."""
        if image not in self.best:
            return float("-inf")
        score, threshold, _ = self.best[image]
        return score - threshold

    def join(self, image: int, mask: Tensor, memory: Memory) -> int | None:
        """Joins a mask with the earlier one, and returns how many tokens it has now; None: nothing changed, or nothing is left."""
        if image in self.masks and memory == "first":
            return None
        joined = self.masks[image] | mask if image in self.masks and memory == "union" else mask
        count = int(joined.sum())
        if count == 0:
            self.masks.pop(image, None)
            return None
        self.masks[image] = joined
        return count
