"""Safe latent diffusion."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from safelight import guard
from safelight.compose import load_pipeline
from safelight.methods.gate import Gate
from safelight.methods.sld import PRESETS, SLD
from safelight.testing import Containing, sample
from safelight.testing.state import assert_identical

PROMPTS = ["a cat and a knife on the beach", "a dog on the meadow"]
CONCEPT = "a knife and a sword"


def released(pipe: Any) -> Any:
    """The deprecated pipeline of diffusers, on the same weights."""
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = StableDiffusionPipelineSafe(
            pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None, requires_safety_checker=False
        )
    made.safety_concept = CONCEPT
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_it_equals_the_released_pipeline(name: Any) -> None:
    pipe = load_pipeline("testbed/sd")
    settings: dict[str, Any] = {"num_inference_steps": 18, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "np"}
    preset = PRESETS[name]
    with torch.no_grad():
        expected = released(pipe)(
            PROMPTS, **settings, generator=torch.Generator().manual_seed(0), sld_guidance_scale=preset.scale, sld_warmup_steps=preset.warmup,
            sld_threshold=preset.threshold, sld_momentum_scale=preset.momentum, sld_mom_beta=preset.beta,
        ).images  # fmt: skip
    with guard(pipe, SLD.preset(name, CONCEPT)):
        found = pipe(PROMPTS, **settings, generator=torch.Generator().manual_seed(0)).images
    plain = pipe(PROMPTS, **settings, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(found - expected).max() <= 1e-4
    assert np.abs(found - plain).max() > 1e-2, "the preset changes the pictures"


def test_a_scale_of_zero_changes_nothing(pipe: Any) -> None:
    expected = sample(pipe, PROMPTS)
    with guard(pipe, SLD(concept="knife", scale=0)):
        assert_identical(sample(pipe, PROMPTS), expected, "a scale of zero changes pictures")


def test_a_gate_confines_it(pipe: Any) -> None:
    expected = sample(pipe, PROMPTS)
    with guard(pipe, Gate(detector=Containing(), method=SLD(concept="knife", warmup=0))) as handle:
        images = sample(pipe, PROMPTS)
    assert_identical(images[1], expected[1], "the harmless prompt's picture changes")
    assert float((images[0] - expected[0]).abs().max()) > 1e-4
    assert [any(action.action == "guided away" for action in record.actions) for record in handle.records] == [True, False]
