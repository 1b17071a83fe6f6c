"""The checks find what they look for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.backbones.flux import Flux
from safelight.detector import Detector
from safelight.site import Port
from safelight.testing import Containing, check_backbone, check_detector, sample, tiny_pipeline

ITEMS = ["a cat", "a knife", "a dog on a beach"]


def test_a_good_detector_passes() -> None:
    detector = Containing()
    check_detector(detector, ITEMS)
    assert detector.threshold == 0.5


class Logits(Detector[str]):
    def __call__(self, items: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(item)) for item in items])


class Ranks(Detector[str]):
    def __call__(self, items: Sequence[str]) -> Tensor:
        return torch.linspace(0, 1, len(items))


class Relative(Detector[str]):
    def __call__(self, items: Sequence[str]) -> Tensor:
        lengths = torch.tensor([float(len(item)) for item in items])
        return lengths / lengths.max()


class Shapeless(Detector[str]):
    def __call__(self, items: Sequence[str]) -> Tensor:
        return torch.zeros(len(items), 1)


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (Logits(), "above 1"),
        (Ranks(), "order of the items"),
        (Relative(), "depends on its company"),
        (Shapeless(), "scores of shape"),
    ],
)
def test_a_bad_detector_is_found_out(detector: Detector[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_detector(detector, ITEMS)


def test_a_wrong_table_is_found_out(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flux, "ports", Flux.ports | {"joint:text": Port("", "output", 1, ("text",))})
    with pytest.raises(AssertionError, match="the layout promises"):
        check_backbone(flux)


def test_tiny_pipelines_are_reproducible() -> None:
    state = torch.random.get_rng_state()
    images = [sample(tiny_pipeline("sd"), "a cat") for _ in range(2)]
    assert torch.equal(*images)
    assert torch.equal(torch.random.get_rng_state(), state), "making a pipeline disturbs the caller's random numbers"
    with pytest.raises(ValueError, match="no tiny pipeline 'sdxl'; there are sd, sd3"):
        tiny_pipeline("sdxl")
