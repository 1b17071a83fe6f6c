"""Text that nobody judged never reaches the denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight import guard
from safelight.backbone import Backbone
from safelight.errors import PromptRequired, SafetyBypassed
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.negative_prompt import NegativePrompt
from safelight.provenance import Known, Provenance
from safelight.testing import Containing, sample, tiny_pipeline

SAFE, OTHER, UNSAFE = "a cat on a beach", "a dog in the snow", "a knife on a beach"


def encoded(pipe: Any, prompt: str) -> torch.Tensor:
    return Backbone.of(pipe).embed([prompt], pipe.encode_prompt).text


def schedule(prompt: str, blend: float = 1.0) -> Any:
    """The maintainers' recipe for prompt schedules: another prompt from the second step on."""

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            text = encoded(pipe, prompt)
            own = values["prompt_embeds"]
            values["prompt_embeds"] = torch.cat([own[: len(own) - 1], torch.lerp(own[-1:], text, blend) if blend < 1 else text])
        return values

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("method", [Block, DualLatent])
def test_a_prompt_that_is_encoded_later_is_judged(name: str, method: Any) -> None:
    pipe = tiny_pipeline(name)
    expected = sample(pipe, SAFE, guided=name == "sd", **schedule(OTHER))
    with guard(pipe, method(detector=Containing())):
        assert torch.equal(sample(pipe, SAFE, guided=name == "sd", **schedule(OTHER)), expected)
        with pytest.raises(SafetyBypassed, match="encoded in the middle of the generation is unsafe"):
            sample(pipe, SAFE, guided=name == "sd", **schedule(UNSAFE))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_mixture_of_embeddings_is_of_unknown_origin(name: str) -> None:
    pipe = tiny_pipeline(name)
    with guard(pipe, Block(detector=Containing())), pytest.raises(SafetyBypassed, match="not encoded and judged in this generation"):
        sample(pipe, SAFE, guided=name == "sd", **schedule(OTHER, blend=0.5))


def test_embeddings_from_elsewhere_are_noticed(pipe: Any) -> None:
    stolen = encoded(pipe, UNSAFE)

    def swap(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        values["prompt_embeds"] = torch.cat([values["prompt_embeds"][:-1], stolen])
        return values

    def poke(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        values["prompt_embeds"][-1:] = stolen
        return values

    for callback in (swap, poke):
        with guard(pipe, Block(detector=Containing())), pytest.raises(SafetyBypassed, match="not encoded and judged"):
            sample(pipe, SAFE, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_a_call_in_a_callback_shifts_nothing(pipe: Any) -> None:
    """FLUX's calls were counted; a call in between made the negative prompt's the conditional one."""
    backbone, seen = Backbone.of(pipe), []
    own = type(backbone.module).forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return own(backbone.module, *args, **kwargs)

    backbone.module.forward = watch

    def call(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            args, kwargs = seen[0]
            backbone.module(*args, **kwargs)
        return values

    with guard(pipe, Block(detector=Containing())), pytest.raises(SafetyBypassed, match=r"called more often than|rows of text for"):
        sample(pipe, SAFE, callback_on_step_end=call)


def test_prompts_of_one_generation_are_unknown_to_the_next(sd: Any) -> None:
    kept: list[torch.Tensor] = []

    def keep(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept.append(values["prompt_embeds"])
        return values

    def use(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        values["prompt_embeds"] = kept[0]
        return values

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with guard(sd, DualLatent(detector=Containing())):
        sample(sd, OTHER, callback_on_step_end=keep, **inputs)
        with pytest.raises(SafetyBypassed, match="not encoded and judged in this generation"):
            sample(sd, SAFE, callback_on_step_end=use, **inputs)


def test_a_guard_around_another_encodes_for_itself() -> None:
    for name in ("sd", "sd3"):
        pipe = tiny_pipeline(name)
        with guard(pipe, Block(detector=Containing())) as inner, guard(pipe, NegativePrompt(words="a dog")) as outer:
            sample(pipe, UNSAFE)
            assert inner.records[0].prompt == UNSAFE
            assert inner.records[0].flagged
            assert [action.method for action in outer.records[0].actions] == ["negative_prompt"]


def test_cached_embeddings_are_nobodys(sd: Any) -> None:
    """A subclass that remembers what it once encoded: the text was judged, the embedding was not made from it."""
    cache = sd.encode_prompt(UNSAFE, "cpu", 1, True)
    sd.encode_prompt = lambda *args, **kwargs: cache
    with guard(sd, Block(detector=Containing())), pytest.raises(SafetyBypassed, match="not read by the pipeline's text encoders"):
        sample(sd, SAFE)


def test_a_negative_embedding_is_no_text(sd: Any) -> None:
    negative = encoded(sd, OTHER)
    with guard(sd, Block(detector=Containing())), pytest.raises(PromptRequired, match="pass `negative_prompt` instead"):
        sample(sd, SAFE, negative_prompt_embeds=negative)


def test_rows_are_known_in_their_place_only() -> None:
    text, pooled = torch.randn(2, 3, 4), torch.randn(2, 5)
    provenance = Provenance(prompts=[Known(text, pooled)], negatives=[Known(text.flip(0), pooled.flip(0))])
    provenance.check(torch.cat([text.flip(0), text]), torch.cat([pooled.flip(0), pooled]), slice(2, 4))
    for wrong in (text.flip(0), text + 1e-6, text[:, :2], text[:1]):
        with pytest.raises(SafetyBypassed):
            Provenance(prompts=[Known(text, pooled)]).check(wrong, pooled[: len(wrong)], slice(0, len(wrong)))
    with pytest.raises(SafetyBypassed):
        Provenance(prompts=[Known(text, pooled)]).check(text.clone(), pooled + 1, slice(0, 2))
    assert provenance.is_prompt(text.clone(), pooled)
    assert not provenance.is_prompt(text.flip(0), pooled.flip(0))


def test_a_tensor_is_looked_at_again_when_it_was_changed() -> None:
    text = torch.randn(1, 3, 4)
    provenance = Provenance(prompts=[Known(text.clone())])
    provenance.check(text, None, slice(0, 1))
    text += 1
    with pytest.raises(SafetyBypassed):
        provenance.check(text, None, slice(0, 1))
