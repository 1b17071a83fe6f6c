"""The negative prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight import guard
from safelight.methods.negative_prompt import NegativePrompt
from safelight.testing import sample

PROMPTS = ["a cat on a beach", "a knife on a beach"]


def test_it_is_the_pipelines_own_negative_prompt(pipe: Any) -> None:
    expected = sample(pipe, PROMPTS, negative_prompt=["knife", "knife"])
    with guard(pipe, NegativePrompt(words="knife")):
        assert torch.allclose(sample(pipe, PROMPTS), expected, atol=1e-5)


def test_without_guidance_it_is_refused(pipe: Any) -> None:
    with (
        guard(pipe, NegativePrompt(words="knife")),
        pytest.raises(ValueError, match=r"needs classifier-free guidance: pass guidance_scale"),
    ):
        sample(pipe, PROMPTS, guided=False)
