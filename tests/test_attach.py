"""A guard that can't act withholds the images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor

from safelight import Method, guard
from safelight.backbone import Backbone
from safelight.errors import PromptRequired, SafetyBypassed, UnsupportedPipeline
from safelight.flow import Embedding, Heads
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.negative_prompt import NegativePrompt
from safelight.site import Site
from safelight.testing import Containing, sample, tiny_pipeline
from safelight.testing.state import assert_same_state, state_of

SAFE, UNSAFE = "a cat on a beach", "a knife on a beach"


class Look(Method):
    """Attends at the given sites and changes nothing."""

    def __init__(self, *sites: str) -> None:
        self._sites = sites

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        return self._sites

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        return attend(heads)


class Reword(Method):
    """Replaces every prompt that contains a knife."""

    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        return encode(["a dog" if "knife" in prompt else prompt for prompt in prompts])


# What is refused up front.


def test_an_unknown_pipeline_is_refused() -> None:
    class UnknownPipeline:
        pass

    with pytest.raises(UnsupportedPipeline, match="no backbone knows UnknownPipeline; known: "):
        guard(UnknownPipeline(), Method())


def test_an_unknown_site_is_refused_and_nothing_stays_attached(pipe: Any) -> None:
    sample(pipe, SAFE)
    before = state_of(pipe)
    with pytest.raises(ValueError, match=r"has no site 'tower\.3'; kinds: "):
        guard(pipe, Method(), Look("tower.3"))
    assert_same_state(pipe, before, "after a failed attachment")
    with pytest.raises(ValueError, match="not a site: 'Joint'"):
        guard(pipe, Look("Joint"))


@pytest.mark.parametrize("enable", [lambda net, config: net.enable_cache(config), apply_first_block_cache])
def test_a_block_cache_is_refused(flux: Any, enable: Callable[[Any, Any], None]) -> None:
    with guard(flux, Method()):
        enable(flux.transformer, FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(UnsupportedPipeline, match=r"block cache skips blocks.*disable_cache"):
            sample(flux, SAFE)
    with pytest.raises(UnsupportedPipeline, match="block cache skips blocks"):
        guard(flux, Method())


def test_a_compiled_denoiser_is_refused(sd: Any, flux: Any) -> None:
    flux.transformer.transformer_blocks[0].compile(backend="eager")  # as `compile_repeated_blocks` does
    with pytest.raises(UnsupportedPipeline, match="the denoiser is compiled"):
        guard(flux, Method())
    with guard(sd, Method()):
        sd.unet.compile(backend="eager")
        with pytest.raises(UnsupportedPipeline, match="the denoiser is compiled"):
            sample(sd, SAFE)
    sd = tiny_pipeline("sd")
    sd.unet = torch.compile(sd.unet, backend="eager")
    with pytest.raises(UnsupportedPipeline, match="the denoiser is compiled"):
        guard(sd, Method())


def test_a_foreign_attention_backend_is_refused(flux: Any) -> None:
    flux.transformer.transformer_blocks[1].attn.processor._attention_backend = "flash"
    with pytest.raises(UnsupportedPipeline, match=r"backend 'flash' can't be guarded at 'joint\.1\.attention'"):
        guard(flux, Look("joint.1.attention"))
    flux.transformer.transformer_blocks[1].attn.processor._attention_backend = "native"
    guard(flux, Look("joint.1.attention")).remove()


# What is noticed during a generation.


def test_a_replaced_scheduler_is_noticed(pipe: Any) -> None:
    with guard(pipe, Method()):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        with pytest.raises(SafetyBypassed, match="scheduler, image processor or autoencoder was replaced after the guard was attached"):
            sample(pipe, SAFE)


def test_a_replaced_denoiser_is_noticed(pipe: Any) -> None:
    name = Backbone.of(pipe).denoiser
    with guard(pipe, Method()):
        setattr(pipe, name, getattr(tiny_pipeline(_name_of(pipe)), name))
        with pytest.raises(SafetyBypassed, match="the denoiser, scheduler, image processor or autoencoder was replaced"):
            sample(pipe, SAFE)


def test_a_skipped_block_is_noticed(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states

    monkeypatch.setattr(flux.transformer.transformer_blocks[0], "forward", skip)
    with guard(flux, Look("joint.1.attention")):
        sample(flux, SAFE)  # another block is none of this method's business
    with (
        guard(flux, Look("joint.0.attention")),
        pytest.raises(SafetyBypassed, match=r"'joint\.0\.attention' was passed 0 times"),
    ):
        sample(flux, SAFE)


def test_a_block_that_runs_twice_is_noticed(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block = flux.transformer.transformer_blocks[0]
    once = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: (once(*args, **kwargs), once(*args, **kwargs))[1])
    with guard(flux, Look("joint.0.attention")), pytest.raises(SafetyBypassed, match="was passed 2 times"):
        sample(flux, SAFE)


def test_a_processor_that_bypasses_sdpa_is_noticed(sd: Any) -> None:
    class Bypass:
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
            return hidden_states

    with guard(sd, Look("middle.0.cross")):
        sample(sd, SAFE)
        sd.unet.set_attn_processor(Bypass())
        with pytest.raises(SafetyBypassed, match=r"bypasses PyTorch's scaled_dot_product_attention"):
            sample(sd, SAFE)


def test_seams_that_were_replaced_later_are_noticed(sd: Any) -> None:
    original = {"forward": sd.unet.forward, "step": sd.scheduler.step, "encode_prompt": sd.encode_prompt}
    for owner, name, message in (
        (sd.unet, "forward", "the scheduler moved on although the guarded denoiser was not called"),
        (sd.scheduler, "step", "called more often than the pipeline calls it in one step"),
        (sd, "encode_prompt", "the denoiser was called outside a guarded generation"),
    ):
        handle = guard(sd, Method())
        guarded = getattr(owner, name)
        setattr(owner, name, original[name])
        with pytest.raises(SafetyBypassed, match=message):
            sample(sd, SAFE)
        setattr(owner, name, guarded)
        handle.remove()


def test_the_parts_can_not_be_used_alone(sd: Any) -> None:
    arguments = (torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 16, 16))
    with guard(sd, Method()):
        with pytest.raises(SafetyBypassed, match="the denoiser was called outside a guarded generation"):
            sd.unet(*arguments)
        sample(sd, SAFE)
        with pytest.raises(SafetyBypassed, match="the denoiser was called outside a guarded generation"):
            sd.unet(*arguments)
        with pytest.raises(SafetyBypassed, match="the scheduler was called outside a guarded generation"):
            sd.scheduler.step(torch.zeros(1), 1, torch.zeros(1))
        assert sd.image_processor.postprocess(torch.zeros(1, 3, 4, 4), output_type="pt").shape == (1, 3, 4, 4)
        assert len(sd.encode_prompt(SAFE, "cpu", 1, False)) == 2
    sd.unet(*arguments)


def test_an_interrupted_generation_is_withheld(pipe: Any) -> None:
    def stop(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return given

    with guard(pipe, Method()), pytest.raises(SafetyBypassed, match=r"the guard saw 1 of 4 steps.*interrupted"):
        sample(pipe, SAFE, steps=4, callback_on_step_end=stop)


def test_latents_are_withheld_from_who_examines_images(pipe: Any, detector: Containing) -> None:
    with guard(pipe, Block(detector=detector)), pytest.raises(SafetyBypassed, match="use another output_type"):
        sample(pipe, UNSAFE, output_type="latent")
    expected = sample(pipe, SAFE, output_type="latent")
    with guard(pipe, DualLatent(detector=detector)):
        assert torch.equal(sample(pipe, SAFE, output_type="latent"), expected)


def test_embeddings_without_text(pipe: Any, detector: Containing) -> None:
    backbone = Backbone.of(pipe)
    embedding, negative = backbone.embed([SAFE], pipe.encode_prompt), backbone.embed([""], pipe.encode_prompt)
    given = {"prompt_embeds": embedding.text}
    if embedding.pooled is not None:
        given["pooled_prompt_embeds"] = embedding.pooled
    if _name_of(pipe) in ("sd", "sd3"):
        given |= {f"negative_{name}": tensor for name, tensor in zip(given, (negative.text, negative.pooled), strict=False)}
    expected = sample(pipe, None, **given)
    with guard(pipe, Method()) as handle:
        assert torch.equal(sample(pipe, None, **given), expected)
        assert [record.prompt for record in handle.records] == [None]
    for method in (Block(detector=detector), DualLatent(detector=detector), Reword()):
        with guard(pipe, method), pytest.raises(PromptRequired, match="`prompt_embeds` alone; pass `prompt`"):
            sample(pipe, None, **given)
    with guard(pipe, NegativePrompt(words="knife")):
        assert not torch.equal(sample(pipe, None, **given), expected)


# Prompts for several encoders.


@pytest.mark.parametrize(("name", "others"), [("flux", ("prompt_2",)), ("kontext", ("prompt_2",)), ("sd3", ("prompt_2", "prompt_3"))])
def test_a_prompt_for_another_encoder_is_judged_and_rewritten(name: str, others: tuple[str, ...], detector: Containing) -> None:
    pipe = tiny_pipeline(name)
    for other in others:
        with guard(pipe, DualLatent(detector=detector)) as handle:
            sample(pipe, SAFE, **{other: UNSAFE})
            assert handle.records[0].flagged, f"{other} was not judged"
            sample(pipe, [SAFE, SAFE], **{other: [SAFE, UNSAFE]})
            assert [record.flagged for record in handle.records] == [False, True]
    expected = sample(pipe, "a dog")
    different = sample(pipe, "a dog", **{others[-1]: UNSAFE})
    assert not torch.equal(expected, different)
    with guard(pipe, Reword()):
        assert torch.equal(sample(pipe, UNSAFE, **dict.fromkeys(others, SAFE)), expected), "the new prompt doesn't reach all encoders"
        assert torch.equal(sample(pipe, UNSAFE), expected)


def test_a_negative_prompt_is_no_prompt(pipe: Any, detector: Containing) -> None:
    expected = sample(pipe, SAFE, negative_prompt=UNSAFE)
    assert not torch.equal(expected, sample(pipe, SAFE))
    with guard(pipe, DualLatent(detector=detector), Reword()) as handle:
        assert torch.equal(sample(pipe, SAFE, negative_prompt=UNSAFE), expected)
    assert not handle.records[0].flagged


# Several at a time.


def test_threads_take_turns(pipe: Any, detector: Containing) -> None:
    prompts = [SAFE, UNSAFE, "a dog in the snow", "a knife at night"]
    with guard(pipe, DualLatent(detector=detector)):
        expected = [sample(pipe, prompt) for prompt in prompts]
        images: dict[int, Tensor] = {}
        _in_threads([lambda i=i, p=p: images.__setitem__(i, sample(pipe, p)) for i, p in enumerate(prompts)])  # type: ignore[misc]
    assert len(images) == len(prompts)
    for index, image in enumerate(expected):
        assert torch.equal(images[index], image), f"{prompts[index]!r} differs when other threads generate"


def test_a_failure_in_one_thread_lets_others_in(sd: Any) -> None:
    inside, images = threading.Event(), []

    def fail(*_: Any) -> dict[str, Any]:
        inside.set()
        raise RuntimeError("on purpose")

    def failing() -> None:
        with pytest.raises(RuntimeError, match="on purpose"):
            sample(sd, SAFE, callback_on_step_end=fail)

    def waiting() -> None:
        assert inside.wait(10)
        images.append(sample(sd, SAFE))

    expected = sample(sd, SAFE)
    with guard(sd, Method()):
        _in_threads([failing, waiting])
        assert torch.equal(images[0], expected)
        assert torch.equal(sample(sd, SAFE), expected)


def test_guards_nest(sd: Any, detector: Containing) -> None:
    with guard(sd, Block(detector=detector)):
        expected = sample(sd, UNSAFE)
        with guard(sd, Method()) as inner:
            assert torch.equal(sample(sd, UNSAFE), expected)
            assert len(inner.records) == 1
        assert torch.equal(sample(sd, UNSAFE), expected)


def test_other_schedulers_and_eta(sd: Any) -> None:
    sd.scheduler = DDIMScheduler(steps_offset=1)
    expected = sample(sd, SAFE, eta=1.0)
    assert not torch.equal(expected, sample(sd, SAFE)), "eta does not reach the scheduler"
    with guard(sd, Method()):
        assert torch.equal(sample(sd, SAFE, eta=1.0), expected), "the guard hides the signature of `step` from the pipeline"


def _in_threads(tasks: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread waits for ever"


def _name_of(pipe: Any) -> str:
    names = {
        "StableDiffusionPipeline": "sd",
        "StableDiffusion3Pipeline": "sd3",
        "FluxPipeline": "flux",
        "FluxKontextPipeline": "kontext",
    }
    return names[type(pipe).__name__]
