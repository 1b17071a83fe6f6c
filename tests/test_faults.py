"""Faults that led past a guard, or left something behind: one test for each, by their kinds in docs/faults.md."""

from __future__ import annotations

import sys
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


# Kind 2: text that nobody judged reaches the denoiser.


def test_embeddings_from_elsewhere_are_withheld() -> None:
    pipe = tiny_pipeline("sd")
    with torch.no_grad():
        text, negative = pipe.encode_prompt(UNSAFE, "cpu", 1, True)

    def swap(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.cat([negative, text])}

    with guard(pipe, block()), pytest.raises(SafetyBypassed, match="not encoded and judged in this generation"):
        sample(pipe, SAFE, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])


# Kind 3: the negative prompt steers too.


def test_the_safe_twin_as_negative_prompt_is_left_out_for_flagged_images() -> None:
    pipe = tiny_pipeline("sd")
    with guard(pipe, DualLatent(detector=Containing(), until=0.0)) as handle:
        twin = sample(pipe, UNSAFE, negative_prompt="a spoon on a beach")
        assert handle.records[0].negative is not None
        assert handle.records[0].negative.left_out
        assert torch.equal(twin, sample(pipe, UNSAFE))


# Kind 5: liveness by a flag.


@pytest.mark.parametrize("error", [ConnectionError(), KeyboardInterrupt(), GeneratorExit()])
def test_after_any_exception_a_sibling_is_refused(error: BaseException) -> None:
    pipe = tiny_pipeline("sd")
    sibling = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)

    def fail(*_: Any) -> Any:
        raise error

    with guard(pipe, block()):
        with pytest.raises(type(error)):
            sample(pipe, SAFE, callback_on_step_end=fail)
        with pytest.raises(SafetyBypassed, match="outside a guarded generation"):
            sample(sibling, UNSAFE)


# Kind 6: attached to something else.


@pytest.mark.parametrize("made", [copy, deepcopy])
def test_a_copy_is_as_guarded_as_the_original(made: Any) -> None:
    pipe = tiny_pipeline("sd")
    with guard(pipe, block()):
        twin = made(pipe)
        sample(twin, UNSAFE)
        assert guards_of(twin)[0].records[0].flagged
        guards_of(twin)[0].remove()
        sample(pipe, UNSAFE)
        assert guards_of(pipe)[0].records[0].flagged


def test_another_autoencoder_would_take_pictures_in_unseen() -> None:
    pipe = tiny_pipeline("kontext")
    with guard(pipe, block()):
        pipe.vae = tiny_pipeline("kontext").vae
        with pytest.raises(SafetyBypassed, match="autoencoder was replaced"):
            sample(pipe, SAFE)


# Kind 7: a guard that did not act.


def test_a_window_that_never_opens_is_refused_or_acts() -> None:
    pipe = tiny_pipeline("sd")
    plain = sample(pipe, UNSAFE)
    with guard(pipe, DualLatent(detector=Containing(), until=0.0)) as handle:
        assert not torch.equal(sample(pipe, UNSAFE), plain)
    assert handle.records[0].flagged


# Kind 8: artefacts.


def test_an_empty_bundle_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="would guard nothing"):
        bundle.save(tmp_path)
    (tmp_path / "method.json").write_text('{"format": "safelight-bundle/1", "made_for": "", "methods": []}')
    with pytest.raises(ArtefactError, match=r"method\.json"):
        bundle.load(tmp_path)


# Interrupts while a guard is attached or removed.


class _Interrupting:
    """Raises a keyboard interrupt at the n-th line of the modules that attach."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(("attach.py", "guarded.py", "engine.py", "tap.py", "wrapping.py")):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


class Looking(Method):
    """Has a site of each sort."""

    def sites(self, backbone: Any) -> Any:
        return ["middle.cross", "middle:image"]


def test_an_interrupt_while_attaching_or_removing_leaves_nothing() -> None:
    pipe = tiny_pipeline("sd")
    plain, before, kind = sample(pipe, UNSAFE, steps=1), state_of(pipe), type(pipe)
    at = 1
    while True:
        tracer = _Interrupting(at)
        try:
            sys.settrace(tracer)
            guard(pipe, block(), Looking()).remove()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        for one in guards_of(pipe):
            one.remove()
        if at % 5 == 0 or tracer.lines < at:
            assert torch.equal(sample(pipe, UNSAFE, steps=1), plain), f"after an interrupt at line {at}"
        assert type(pipe) is kind, f"after an interrupt at line {at}"
        assert_same_state(pipe, before, f"after an interrupt at line {at}")
        if tracer.lines < at:
            break
        at += 1
