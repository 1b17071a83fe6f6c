"""What a detector must keep to."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..calibration import upper_bound
from ..detector import Detector


def check_detector(detector: Detector[Any], items: Sequence[Any]) -> None:
    """Checks a detector on a few items of its kind, at least two.

    Raises:
        AssertionError: if scores are no risks in 0..1, depend on the company or the order of the items, or disagree with the
            verdicts; or if calibration does not hold its promise on the items it was given.
    """
    name = type(detector).__name__
    assert len(items) > 1, "give at least two items"
    scores = torch.as_tensor(detector(items))
    assert scores.shape == (len(items),), f"{name} gave scores of shape {tuple(scores.shape)} for {len(items)} items"
    assert torch.isfinite(scores).all(), f"{name} gave a score that is not finite"
    assert scores.min() >= -1e-6, f"{name} gave a score below 0"
    assert scores.max() <= 1 + 1e-6, f"{name} gave a score above 1"
    again = torch.as_tensor(detector(list(reversed(items)))).flip(0)
    assert torch.allclose(scores, again, atol=1e-4), f"{name}: scores depend on the order of the items"
    alone = torch.stack([torch.as_tensor(detector([item]))[0] for item in items])
    assert torch.allclose(scores, alone, atol=1e-4), f"{name}: the score of an item depends on its company"
    _check_verdicts(detector, items)
    _check_calibration(detector, items)


def _check_verdicts(detector: Detector[Any], items: Sequence[Any]) -> None:
    name = type(detector).__name__
    verdicts = detector.verdicts(items)
    assert len(verdicts) == len(items), f"{name} gave {len(verdicts)} verdicts for {len(items)} items"
    for verdict in verdicts:
        assert verdict.threshold == detector.threshold, f"{name}: a verdict names another threshold than the detector's"
        assert verdict.flagged == (verdict.score > verdict.threshold) or verdict.note, (
            f"{name}: a verdict of {verdict.score:g} at threshold {verdict.threshold:g} is "
            f"{'' if verdict.flagged else 'not '}flagged, and no note says why"
        )


def _check_calibration(detector: Detector[Any], items: Sequence[Any]) -> None:
    own = copy.copy(detector)  # the caller's threshold stays as it is
    target = min(0.999, math.nextafter(upper_bound(0, len(items)), 1))
    try:
        calibration = own.calibrate(items, target_fpr=target)
    except ValueError as error:  # as when the highest score is shared by too many items
        assert len(str(error)) > 30, f"{type(own).__name__} can't be calibrated, but says no more than {str(error)!r}"
        return
    assert own.threshold == calibration.threshold, f"{type(own).__name__}.calibrate doesn't set the threshold"
    flagged = sum(verdict.flagged for verdict in own.verdicts(items))
    name = type(own).__name__
    assert flagged == calibration.flagged, f"{name} flags {flagged} benign items where calibration promised {calibration.flagged}"
