"""Safe latent diffusion."""

from __future__ import annotations

import warnings
from dataclasses import replace
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
WARMUP = {"weak": 15, "medium": 10, "strong": 7, "max": 0}
"""Steps without guidance in the paper's four settings, of 50; the presets take the same share of however many there are."""


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
            PROMPTS, **settings, generator=torch.Generator().manual_seed(0), sld_guidance_scale=preset.scale, sld_warmup_steps=WARMUP[name],
            sld_threshold=preset.threshold, sld_momentum_scale=preset.momentum, sld_mom_beta=preset.beta,
        ).images  # fmt: skip
    with guard(pipe, replace(SLD.preset(name, CONCEPT), warmup=WARMUP[name] / 18)):
        found = pipe(PROMPTS, **settings, generator=torch.Generator().manual_seed(0)).images
    plain = pipe(PROMPTS, **settings, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(found - expected).max() <= 1e-4
    assert np.abs(found - plain).max() > 1e-2, "the preset changes the pictures"


def test_presets_warm_up_for_the_papers_share_of_the_steps(sd: Any) -> None:
    for name, steps in WARMUP.items():
        assert round(50 * PRESETS[name].warmup) == steps
        with guard(sd, SLD.preset(name, CONCEPT)) as handle:  # type: ignore[arg-type]
            sample(sd, PROMPTS, steps=5)
        assert handle.records[0].actions[0].steps == (round(5 * PRESETS[name].warmup), 5), "in few steps it acts too"


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
