"""The moments of anchors on one scale, so that one τ and one level hold wherever in the noise schedule a look falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..anchors import Anchors, Kind
from ..calibration import Calibration
from ..masks import clean, iou
from .examples import Example

LEAST_RECALL = 0.5
"""The share of unsafe images that have to reach τ, at least."""
APART = 0.1
"""How far a level has to be below τ to tell the scale of scores, in standard deviations of what benign images reach."""


@dataclass(frozen=True)
class Limits:
    """τ and level, by what was seen at some moments."""

    calibration: Calibration
    level: float
    spread: float
    """The standard deviation of what benign images reach."""
    recall: float
    """The share of unsafe images that exceed τ."""
    overlap: float
    """Mean IoU of masks at the level with the judge's."""

    @property
    def threshold(self) -> float:
        """τ."""
        return self.calibration.threshold


@dataclass(frozen=True)
class HeldOut:
    """What a probe saw in examples that it was not collected from."""

    peaks: Tensor
    """The highest score of each benign image at each moment, [benign, moments]."""
    prompts: Sequence[str]
    """Of the benign ones."""
    own: Tensor
    """Scores of the concept that an unsafe image shows, [unsafe, moments, height, width]."""
    masks: Tensor
    """Where the judge saw it, [unsafe, height, width]."""
    target_fpr: float
    """The share of benign images that may exceed τ."""
    margin: float
    """Where τ is put if unsafe images score well above what benign ones ask for: 0 at that, 1 at the 5 % weakest of them."""

    @classmethod
    def of(
        cls, anchors: Anchors, scores: Tensor, masks: Sequence[Tensor | None], examples: Sequence[Example], target_fpr: float, margin: float
    ) -> HeldOut:  # fmt: skip
        """From score maps [images, moments, concepts, height, width].

        Raises:
            ValueError: if no unsafe image shows its concept.
        """
        benign = [i for i, example in enumerate(examples) if not example.concept]
        pairs = enumerate(zip(examples, masks, strict=True))
        seen = [(i, anchors.concepts.index(e.concept), mask) for i, (e, mask) in pairs if e.concept and mask is not None]
        if not seen:
            raise ValueError(f"no unsafe example shows its concept at '{anchors.site}'; give others, or masks of your own")
        own = torch.stack([scores[i, :, concept] for i, concept, _ in seen])
        peaks = scores[benign].amax(dim=(2, 3, 4))
        return cls(peaks, [examples[i].prompt for i in benign], own, torch.stack([mask for _, _, mask in seen]), target_fpr, margin)

    def limits(self, moments: slice) -> Limits:
        """τ and level for looks at some of the moments, one after the other."""
        peaks = self.peaks[:, moments].amax(1).tolist()
        calibration = Calibration.fit(peaks, self.target_fpr, items=self.prompts)
        tops = self.own[:, moments].amax(dim=(1, 2, 3))
        calibration = calibration.towards(float(tops.quantile(0.05)), self.margin, peaks)
        level, overlap = _best_level(self.own[:, moments], self.masks, calibration.threshold)
        spread, recall = float(self.peaks[:, moments].amax(1).std()), float((tops > calibration.threshold).float().mean())
        return Limits(calibration, level, spread, recall, overlap)


def on_one_scale(anchors: Anchors, held: HeldOut, limits: Limits, first: int) -> Anchors:
    """Maps the scores of every moment from the `first` on so that the same τ and level hold there.

    Each moment is calibrated on its own, and a s + b takes its τ and level to the common ones; both go into weights and bias, as what is
    done to scores afterwards (nearest cluster, average of neighbours) commutes with it. Then all of these moments are calibrated together:
    benign images (drawn from noise) stay below τ however many of them are looked at, but for the share that `target_fpr` allows, with the same
    confidence as in the window. Whoever looks at both the window and later has the sum of both shares. Cosines can only be shifted.

    Moments end before the first at which fewer than half of the unsafe images reach τ: there nothing could be relied on.
    """
    own = [held.limits(slice(moment, moment + 1)) for moment in range(first, len(anchors.moments))]
    own = own[: next((i for i, one in enumerate(own) if one.recall < LEAST_RECALL), len(own))]
    if not own:
        return _first(anchors, first)
    maps = [_towards(one, limits, anchors.kind) for one in own]
    scale, shift = torch.tensor([a for a, _ in maps]), torch.tensor([b for _, b in maps])
    peaks = (held.peaks[:, first : first + len(own)] * scale + shift).amax(1)
    together = replace(limits, calibration=Calibration.fit(peaks.tolist(), held.target_fpr))
    if together.threshold > limits.threshold:
        a, b = _towards(together, limits, anchors.kind)
        scale, shift = scale * a, shift * a + b
    return _scaled(_first(anchors, first + len(own)), first, scale, shift)


def _towards(own: Limits, common: Limits, kind: Kind) -> tuple[float, float]:
    """The affine map that takes a τ and a level to the common ones; where a level is as good as τ, spreads tell the scale."""
    before, after = own.threshold - own.level, common.threshold - common.level
    if before < APART * own.spread or after < APART * common.spread:
        before, after = own.spread, common.spread
    scale = 1.0 if kind == "cosine" or min(before, after) <= 0 else after / before
    return scale, common.threshold - scale * own.threshold


def _scaled(anchors: Anchors, first: int, scale: Tensor, shift: Tensor) -> Anchors:
    """The scores of moments from the `first` on, times `scale`, plus `shift` [moments from there on]."""
    weights, bias = anchors.weights.clone(), anchors.bias.clone()
    weights[first:] *= scale[:, None, None, None]
    bias[first:] = bias[first:] * scale[:, None, None] + shift[:, None, None]
    return replace(anchors, weights=weights, bias=bias)


def _first(anchors: Anchors, count: int) -> Anchors:
    """The first moments."""
    return replace(anchors, weights=anchors.weights[:count], bias=anchors.bias[:count], moments=anchors.moments[:count])


def _best_level(own: Tensor, masks: Tensor, threshold: float) -> tuple[float, float]:
    """The level, at most τ, at which masks overlap best with the judge's: scores [unsafe, steps, height, width]."""
    flat, wanted = own.flatten(0, 1), masks.repeat_interleave(own.shape[1], dim=0)
    candidates = torch.cat([flat[wanted].quantile(torch.linspace(0.02, 0.6, 24)).clamp(max=threshold), torch.tensor([threshold])]).unique()
    overlaps = [float(iou(clean(flat > level, flat.sigmoid()), wanted).mean()) for level in candidates]
    best = max(range(len(overlaps)), key=overlaps.__getitem__)
    return float(candidates[best]), overlaps[best]
