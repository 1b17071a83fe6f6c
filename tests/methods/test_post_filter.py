"""Judging finished pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safelight import guard
from safelight.compose import build, call_settings, load_pipeline
from safelight.detector import Detector, Forced
from safelight.errors import SafetyBypassed
from safelight.evaluation.evaluate import forced_methods
from safelight.generator import Generator, as_bytes
from safelight.methods.block import Block
from safelight.methods.gate import Gate
from safelight.methods.post_filter import PostFilter
from safelight.testing import Containing, sample
from safelight.testing.state import assert_identical

PROMPTS = ["a cat and a knife on the beach", "a dog on the meadow"]


@dataclass(kw_only=True, eq=False)
class Brightness(Detector[Any]):
    """The mean of a picture."""

    threshold: float = 0.5
    reads = "picture"

    def __call__(self, items: Sequence[Any]) -> Tensor:
        assert all(item.dtype == np.uint8 and item.shape[-1] == 3 for item in items)
        return torch.tensor([item.mean() / 255 for item in items])


def test_only_flagged_pictures_are_withheld(pipe: Any) -> None:
    expected = sample(pipe, [*PROMPTS, *PROMPTS])
    means = expected.mean(dim=(1, 2, 3)).sort().values
    gap = int(means.diff().argmax())  # pixels are rounded: only a wide gap tells pictures apart
    threshold = float(means[gap : gap + 2].mean())
    with guard(pipe, PostFilter(detector=Brightness(threshold=threshold))) as handle:
        images = sample(pipe, [*PROMPTS, *PROMPTS])
    assert sum(record.flagged for record in handle.records) == 3 - gap
    for image, before, record in zip(images, expected, handle.records, strict=True):
        (action,) = record.actions
        assert (action.threshold, action.score) == (threshold, pytest.approx(float(before.mean()), abs=2e-3))
        assert action.flagged == (float(before.mean()) > threshold) == (action.action == "refused")
        assert_identical(image, torch.full_like(image, 0.5) if action.flagged else before, "wrong picture")


def test_a_picture_that_cannot_be_judged_is_withheld(sd: Any) -> None:
    class Broken(PostFilter):
        def decode(self, images: Tensor, decode: Any) -> Any:
            images = images.clone()
            images[0, 0, 0, 0] = torch.nan
            return super().decode(images, decode)

    with guard(sd, Broken(detector=Brightness(threshold=0.99))) as handle:
        images = sample(sd, PROMPTS)
    assert [record.flagged for record in handle.records] == [True, False]
    assert "not finite" in str(handle.records[0].actions[0].note)
    assert_identical(images[0], torch.full_like(images[0], 0.5), "the picture got out")


def test_a_gate_confines_it(sd: Any) -> None:
    expected = sample(sd, PROMPTS)
    with guard(sd, Gate(detector=Containing(), method=PostFilter(detector=Brightness(threshold=0.0)))) as handle:
        images = sample(sd, PROMPTS)
    assert_identical(images[1], expected[1], "a picture outside of the gate changes")
    assert [record.flagged for record in handle.records] == [True, False]
    assert images[0].std() == 0


def test_each_guard_has_the_detector_that_it_can_use(sd: Any) -> None:
    with pytest.raises(ValueError, match="Containing reads prompts"):
        PostFilter(detector=Containing())
    with guard(sd, Block(detector=Brightness())), pytest.raises(ValueError, match="Brightness judges pictures"):
        sample(sd, PROMPTS)
    (forced,) = forced_methods([PostFilter(detector=Brightness())]) or [None]
    assert isinstance(forced, PostFilter)
    assert isinstance(forced.detector, Forced)
    assert [verdict.flagged for verdict in forced.detector.verdicts([np.zeros((4, 4, 3), np.uint8)])] == [True]


def test_latents_are_refused(sd: Any) -> None:
    with guard(sd, PostFilter(detector=Brightness())), pytest.raises(SafetyBypassed):
        sample(sd, PROMPTS, output_type="latent")


def test_it_works_on_the_testbed() -> None:
    generator = Generator(load_pipeline("testbed/sd"), call_settings("testbed/sd"))

    @dataclass
    class Request:
        prompt: str
        seed: int
        image: None = None

    requests = [Request("a knife on the beach", 1), Request("a cat and a bomb on the snow", 2), Request("a dog on the meadow", 3)]
    plain = generator(requests)
    with guard(generator.pipe, *build(["post_filter"], "testbed/sd")) as handle:
        guarded = generator(requests)
    assert [record.flagged for record in handle.records] == [True, True, False]
    assert [record.actions[0].concept for record in handle.records] == ["knife", "bomb", None]
    assert np.array_equal(guarded[2], plain[2])
    assert all(as_bytes(image).std() == 0 for image in guarded[:2])
