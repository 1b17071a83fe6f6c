"""Dual latent reconstruction does what the paper's formula says."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from safelight import guard
from safelight.backbone import Backbone
from safelight.methods.dual_latent import DualLatent
from safelight.safe_guidance import InContext
from safelight.testing import Containing, sample, tiny_pipeline
from safelight.testing.tiny import LATENT_SIZE

Coupling = Literal["coupled", "free"]
SAFE, UNSAFE, LED = "a cat on a beach", "a knife on a beach", "a knife on a beach, peaceful"
SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler)

both = pytest.mark.parametrize("coupling", ["coupled", "free"])
with_and_without_guidance = pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])


def dual(**fields: Any) -> DualLatent:
    return DualLatent(detector=Containing(), guidance=InContext("peaceful"), **fields)


def guarded(pipe: Any, method: DualLatent, prompts: Any = UNSAFE, **changes: Any) -> Tensor:
    with guard(pipe, method):
        return sample(pipe, prompts, **changes)


@both
@with_and_without_guidance
def test_until_0_is_sampling_with_safe_guidance(pipe: Any, coupling: Coupling, guided: bool) -> None:
    images = guarded(pipe, dual(until=0, coupling=coupling), guided=guided)
    assert torch.allclose(images, sample(pipe, LED, guided=guided), atol=1e-5)


@both
@with_and_without_guidance
def test_until_1_without_safe_weight_is_the_base_model(pipe: Any, coupling: Coupling, guided: bool) -> None:
    images = guarded(pipe, dual(until=1, safe_weight=0, coupling=coupling), [UNSAFE, SAFE], guided=guided)
    # FLUX's guidance scale is measured, not told, so the free branch repeats it up to rounding.
    assert torch.allclose(images, sample(pipe, [UNSAFE, SAFE], guided=guided), atol=1e-3 if coupling == "free" else 1e-5)


@both
def test_safe_weight_1_is_sampling_with_safe_guidance(pipe: Any, coupling: Coupling) -> None:
    images = guarded(pipe, dual(until=1, safe_weight=1, coupling=coupling))
    assert torch.allclose(images, sample(pipe, LED), atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sd3"], ids=["DDIM", "flow-match Euler"])
@pytest.mark.parametrize("weight", [0.25, 0.75])
def test_coupled_is_latent_blending(name: str, weight: float) -> None:
    pipe = tiny_pipeline(name)
    method = dual(until=0.5, safe_weight=weight)
    latents = guarded(pipe, method, seeds=[5], steps=6, output_type="latent")
    expected = blended(pipe, weight, blending=3, steps=6, seed=5)
    assert torch.allclose(latents, expected, atol=1e-4)
    assert not torch.allclose(latents, sample(pipe, LED, seeds=[5], steps=6, output_type="latent"), atol=1e-3)


@torch.no_grad()
def blended(pipe: Any, weight: float, blending: int, steps: int, seed: int, scale: float = 3.0) -> Tensor:
    """The formula, literally: two branches from the same latents, each with guidance and a scheduler step of its own."""
    backbone, scheduler = Backbone.of(pipe), deepcopy(pipe.scheduler)
    nothing, own, safe = (backbone.embed([prompt], pipe.encode_prompt) for prompt in ("", UNSAFE, LED))
    latents = torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)

    def move(scheduler: Any, prompt: Any, timestep: Tensor) -> Tensor:
        predictions = []
        for embedding in (nothing, prompt):
            arguments = {"encoder_hidden_states": embedding.text, "return_dict": False}
            if embedding.pooled is None:
                predictions.append(pipe.unet(latents, timestep, **arguments)[0])
            else:
                arguments |= {"pooled_projections": embedding.pooled, "timestep": timestep.expand(1)}
                predictions.append(pipe.transformer(latents, **arguments)[0])
        uncond, cond = predictions
        return scheduler.step(uncond + scale * (cond - uncond), timestep, latents, return_dict=False)[0]

    for index, timestep in enumerate(scheduler.timesteps):
        other = deepcopy(scheduler)
        led = move(scheduler, safe, timestep)
        latents = weight * led + (1 - weight) * move(other, own, timestep) if index < blending else led
    return latents


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_free_branches_have_schedulers_of_their_own(sd: Any, scheduler: Any) -> None:
    """Multistep schedulers remember predictions; a shared one would mix the branches'."""
    sd.scheduler = scheduler.from_config(sd.scheduler.config)
    base, led = sample(sd, UNSAFE, steps=5), sample(sd, LED, steps=5)
    assert torch.allclose(guarded(sd, dual(until=0, coupling="free"), steps=5), led, atol=1e-5)
    assert torch.allclose(guarded(sd, dual(until=1, safe_weight=0, coupling="free"), steps=5), base, atol=1e-4)
    # One step: each further one pulls the safe branch closer to the prompt's.
    mixed = guarded(sd, dual(until=0.2, safe_weight=0.5, coupling="free"), steps=5)
    assert torch.isfinite(mixed).all()
    apart = (led - base).abs().max()
    assert (mixed - base).abs().max() > 0.1 * apart
    assert (mixed - led).abs().max() > 0.1 * apart


@both
@pytest.mark.parametrize("source", ["one per image", "one", "global"])
def test_noise_of_the_scheduler_is_shared(sd: Any, coupling: Coupling, source: str) -> None:
    """With eta > 0 every step draws noise; an extra branch may neither use it up nor see another one."""

    def images() -> Tensor:
        torch.manual_seed(3)
        generators = {"one": torch.Generator().manual_seed(3), "global": None}
        return sample(
            sd,
            [SAFE, UNSAFE, SAFE],
            eta=1.0,
            **({} if source == "one per image" else {"generator": generators[source]}),
        )

    expected = images()
    with guard(sd, dual(until=0.7, coupling=coupling)):
        assert torch.equal(images()[[0, 2]], expected[[0, 2]])
    with guard(sd, dual(until=1, safe_weight=0, coupling=coupling)):
        assert torch.allclose(images(), expected, atol=1e-4)


@both
@with_and_without_guidance
def test_cost_in_denoiser_rows(pipe: Any, coupling: Coupling, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, rows = Backbone.of(pipe).module, []
    original = module.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "forward", count)
    steps, blending, halves = 5, 2, 2 if guided else 1
    for prompts, flagged in ((UNSAFE, 1), ([SAFE, UNSAFE, SAFE, UNSAFE], 2), ([SAFE, SAFE], 0)):
        rows.clear()
        guarded(pipe, dual(until=0.4, coupling=coupling), prompts, steps=steps, guided=guided)
        images = 1 if isinstance(prompts, str) else len(prompts)
        extra = flagged * blending * (1 if coupling == "coupled" else halves)
        assert sum(rows) == images * halves * steps + extra


def test_weights_are_normalised(sd: Any) -> None:
    with pytest.warns(UserWarning, match=r"safe_weight \+ weight is 1\.2; both are divided by it"):
        method = dual(safe_weight=0.6, weight=0.6, until=0.7)
    assert torch.equal(guarded(sd, method), guarded(sd, dual(safe_weight=0.5, until=0.7)))
    with pytest.raises(ValueError, match="leave nothing to blend; raise one of them"):
        dual(safe_weight=0, weight=0)


def test_renorm_keeps_the_spread_of_the_latents(sd: Any) -> None:
    """The mean of two latents that differ has a smaller standard deviation than either."""
    spread = {
        renorm: float(guarded(sd, dual(coupling="free", until=1, safe_weight=0.5, renorm=renorm), output_type="latent", steps=5).std())
        for renorm in (True, False)
    }
    plain = [float(sample(sd, prompt, output_type="latent", steps=5).std()) for prompt in (UNSAFE, LED)]
    assert spread[True] == pytest.approx(sum(plain) / 2, rel=0.05)
    assert spread[True] >= spread[False]


@both
def test_more_blending_keeps_more_of_the_prompt(sd: Any, coupling: Coupling) -> None:
    base = sample(sd, UNSAFE, steps=6, output_type="latent")
    distances = [
        float((guarded(sd, dual(until=until, safe_weight=0.1, coupling=coupling), steps=6, output_type="latent") - base).square().mean())
        for until in (0.0, 0.34, 0.67, 1.0)
    ]
    assert distances == sorted(distances, reverse=True)


def test_the_record_says_what_was_done(sd: Any) -> None:
    with guard(sd, dual(safe_weight=0.6)) as handle:
        sample(sd, [SAFE, UNSAFE])
    assert [record.actions[0].action for record in handle.records] == ["none", "reconstructed"]
    assert handle.records[1].actions[0].strength == pytest.approx(0.6)
    assert handle.run is not None
    assert handle.run.events == [{"event": "flagged", "step": 0, "images": [1]}]


def test_the_prompts_own_branch_follows_all_of_its_texts(flux: Any) -> None:
    expected = sample(flux, SAFE, prompt_2=UNSAFE)
    images = guarded(flux, dual(until=1, safe_weight=0, coupling="free"), SAFE, prompt_2=UNSAFE)
    assert torch.allclose(images, expected, atol=1e-3)
