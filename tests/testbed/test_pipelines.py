"""The bundled pipelines load without network and do what they are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline, StableDiffusionPipeline

from safelight import guard, testbed
from safelight.compose import build
from safelight.errors import ArtefactError
from safelight.testbed.judges import Classifier

KINDS = {"sd": StableDiffusionPipeline, "flux": FluxPipeline, "kontext": FluxKontextPipeline}


@pytest.mark.parametrize("name", KINDS)
def test_they_are_plain_diffusers_pipelines(name: str) -> None:
    assert type(testbed.load(name)) is KINDS[name]


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_an_unsafe_prompt_comes_out_safe_and_a_benign_one_untouched(name: str) -> None:
    pipe, settings = testbed.load(name), testbed.settings(name) | {"output_type": "np"}
    prompts = ["a cat and a bomb on the beach", "a dog on the snow"]
    if "negative_prompt" in settings:
        settings["negative_prompt"] = [""] * len(prompts)
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(len(prompts))]  # noqa: E731
    base = pipe(prompts, generator=seeds(), **settings).images
    with guard(pipe, *build(["dual_latent"], f"testbed/{name}")) as handle:
        guarded = pipe(prompts, generator=seeds(), **settings).images
    before, after = (Classifier().look([(image * 255).round().astype("uint8") for image in images]) for images in (base, guarded))
    assert "bomb" in before[0].objects
    assert "bomb" not in after[0].objects
    assert "cat" in after[0].objects
    assert (base[1] == guarded[1]).all()
    assert [record.flagged for record in handle.records] == [True, False]
    assert handle.records[0].decisive is not None
    assert handle.records[0].decisive.concept == "weapons"


def test_a_plain_call_works_at_the_world_size() -> None:
    image = testbed.load("flux")("a cat on the beach", num_inference_steps=2, guidance_scale=1.0).images[0]
    assert image.size == (64, 64)


def test_unknown_names_and_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no testbed pipeline 'sdxl'"):
        testbed.load("sdxl")
    with pytest.raises(ArtefactError, match="can't be read"):
        testbed.load("sd", tmp_path)
