"""Faults that led past a guard, or left something behind: one test for each, by their kinds in docs/faults.md."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from safelight import Method, bundle, guard
from safelight.attach import guards_of
from safelight.errors import ArtefactError, SafetyBypassed, UnjudgedImageWarning
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.post_filter import PostFilter
from safelight.testing import Containing, sample, tiny_pipeline
from safelight.testing.state import assert_same_state, state_of
from safelight.tokens import expanded, word_spans

SAFE, UNSAFE = "a cat on a beach", "a knife on a beach"


def block() -> Block:
    return Block(detector=Containing())


# Kind 1: the judge reads another text than the model.


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusion3Pipeline])
def test_a_pipeline_that_rewrites_prompts_and_hides_its_arguments(kind: Any) -> None:
    class Rewriting(kind):
        def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            return super().encode_prompt([text.replace("spoon", "knife") for text in prompt], *args, **kwargs)

    plain = tiny_pipeline("sd" if kind is StableDiffusionPipeline else "sd3")
    pipe = Rewriting(**plain.components, **({"requires_safety_checker": False} if kind is StableDiffusionPipeline else {}))
    pipe.set_progress_bar_config(disable=True)
    with guard(pipe, DualLatent(detector=Containing(), until=0.5)) as handle:
        sample(pipe, ["a spoon on a beach"] * 2, num_images_per_prompt=2)
    assert [record.flagged for record in handle.records] == [True] * 4


def test_a_learned_word_has_as_many_tokens_as_vectors() -> None:
    pipe = tiny_pipeline("sd")
    pipe.load_textual_inversion(torch.randn(3, 16), token="<thing>")
    assert expanded(pipe.tokenizer, "a <thing> at night") == pipe.maybe_convert_prompt("a <thing> at night", pipe.tokenizer)
    assert [span.stop - span.start for span in word_spans(pipe.tokenizer, "a <thing> at night")] == [1, 3, 1, 1]


# Kind 4: pictures go in unjudged.


def _planting(place: int, in_place: bool) -> Any:
    def plant(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index != place:
            return values
        if in_place:
            values["latents"].mul_(0.5)
            return values
        return {"latents": values["latents"] * 0.5}

    return plant


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("place", [0, 2])
def test_latents_that_a_callback_changes_are_told(pipe: Any, place: int, in_place: bool) -> None:
    with guard(pipe, block()) as handle, pytest.warns(UnjudgedImageWarning, match="callback changed the latents"):
        sample(pipe, SAFE, callback_on_step_end=_planting(place, in_place))
    assert "latents (changed by a callback)" in handle.records[0].unjudged
    with guard(pipe, block(), unjudged_images="refuse"), pytest.raises(SafetyBypassed, match="the images are withheld"):
        sample(pipe, SAFE, callback_on_step_end=_planting(place, in_place))


def test_a_callback_that_only_looks_is_not_told() -> None:
    pipe = tiny_pipeline("sd")
    with guard(pipe, block()) as handle:
        sample(pipe, SAFE, callback_on_step_end=lambda pipe, index, timestep, values: values)
    assert handle.records[0].unjudged == []


def test_diffusers_own_callbacks_are_watched_and_known_as_such() -> None:
    from diffusers.callbacks import SDCFGCutoffCallback

    pipe = tiny_pipeline("sd")
    plain = sample(pipe, SAFE, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
    with guard(pipe, block()) as handle:
        guarded = sample(pipe, SAFE, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
    assert torch.equal(plain, guarded)
    assert handle.records[0].unjudged == []
