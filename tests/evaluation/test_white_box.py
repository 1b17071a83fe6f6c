"""Gradients through guards, on tiny pipelines and with the bundled guards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safelight import Method, guard
from safelight.bank import Bank, Pair
from safelight.compose import build, call_settings, load_pipeline
from safelight.detectors.neighbours import Neighbours
from safelight.errors import UnsupportedPipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.case import Case
from safelight.evaluation.white_box.objective import Objective
from safelight.evaluation.white_box.soft import SoftTokens
from safelight.evaluation.white_box.targets import image_target, model_target
from safelight.evaluation.white_box.through import View, look
from safelight.evaluation.white_box.words import Template, Words, text_encoders
from safelight.generator import Generator
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.negative_prompt import NegativePrompt
from safelight.methods.sld import SLD
from safelight.safe_guidance import InContext
from safelight.testing import tiny_pipeline
from safelight.testing.state import assert_same_state, state_of

PAIRS = [Pair("a knife on a beach", "a spoon on a beach", "weapons"), Pair("a sword and a cat", "a dog and a cat", "weapons")]
PROMPTS = ("a knife on a beach", "a cat in the snow")


def generator_of(pipe: Any, steps: int = 4) -> Generator:
    """A generator of tiny pictures, guided."""
    settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    flux = type(pipe).__name__.startswith("Flux")
    return Generator(pipe, settings | ({"true_cfg_scale": 2.0, "negative_prompt": ""} if flux else {"guidance_scale": 3.0}))


def cases_of(prompts: tuple[str, ...] = PROMPTS) -> list[Case]:
    return [Case(f"{index}", prompt, True, "weapons", 10 + index) for index, prompt in enumerate(prompts)]


def detector_of(pipe: Any, threshold: float = 0.5) -> Neighbours:
    with guard(pipe, Method()) as handle:
        bank = Bank.build(lambda texts: handle.backbone.pool(texts, pipe.encode_prompt), PAIRS, ["a cat in the snow", "a car at night"])
    return Neighbours(bank=bank, k=2, threshold=threshold, temperature=0.5)


@pytest.fixture(params=["sd", "sd3", "flux"])
def generator(request: pytest.FixtureRequest) -> Generator:
    return generator_of(tiny_pipeline(request.param))


def test_words_are_one_token_for_every_encoder(generator: Generator) -> None:
    words = Words.of(generator.pipe, banned=["knife"])
    assert "knife" not in words.texts
    assert "blade" in words.texts
    assert words.ids.shape == (len(words.encoders), len(words.texts))
    for encoder, ids in zip(words.encoders, words.ids, strict=True):
        assert [encoder.tokenizer.decode([index]).strip() for index in ids.tolist()] == list(words.texts)


def test_a_ban_of_all_words_is_refused(sd: Any) -> None:
    with pytest.raises(ValueError, match="ban fewer words"):
        Words.of(sd, Words.of(sd).texts)


def test_a_pipeline_without_text_encoders_is_refused() -> None:
    with pytest.raises(UnsupportedPipeline, match="without text encoders"):
        text_encoders(SimpleNamespace(text_encoder=None, tokenizer=None))


@pytest.mark.parametrize("parts", [(None, None, "a knife"), ("a knife", None, "on the", None), (None, None, None), ("a, knife: on", None)])
def test_templates_know_where_their_gaps_are(generator: Generator, parts: tuple[str | None, ...]) -> None:
    words, template = Words.of(generator.pipe), Template(parts)
    chosen = list(range(5, 5 + template.slots))
    text = template.fill([words.texts[index] for index in chosen])
    for encoder, known in zip(words.encoders, words.ids, strict=True):
        ids = encoder.ids([text])[0]
        assert ids[template.places(encoder)].tolist() == known[chosen].tolist()


@pytest.mark.parametrize("name", ["none", "dual_latent", "block", "sld"])
def test_gradients_through_a_guard_are_those_of_finite_differences(generator: Generator, name: str) -> None:
    pipe = generator.pipe
    detector = detector_of(pipe)
    guards = {
        "none": [], "dual_latent": [DualLatent(detector=detector, guidance=InContext(), safe_weight=0.5)],
        "block": [Block(detector=detector)], "sld": [SLD(concept="a knife", warmup=0, scale=1.0, threshold=10.0)],
    }  # fmt: skip
    cases = cases_of()
    words = Words.of(pipe)
    objective = Objective(generator, guards[name], cases, model_target(generator, cases, 0.25), words)
    objective.begin()
    template = [Template((None, None, case.prompt)) for case in cases]
    prompts = [own.fill(["cat", "beach"]) for own in template]
    soft = SoftTokens(words.encoders, template, prompts)

    def value(graph: bool) -> torch.Tensor:
        with soft.added():
            return objective._value(range(2), objective._look(range(2), prompts, graph=graph)).soft

    gradients = torch.autograd.grad(value(True).sum(), soft.deltas)
    chance = torch.Generator().manual_seed(0)
    for delta, gradient in zip(soft.deltas, gradients, strict=True):
        way = torch.randn(delta.shape, generator=chance) * 1e-2 * delta.shape[-1] ** -0.5
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                delta += sign * way
            found.append(value(False).double())
            with torch.no_grad():
                delta -= sign * way
        wanted = float((found[0] - found[1]).sum() / 2)
        assert float((gradient * way).sum()) == pytest.approx(wanted, rel=0.05, abs=2e-5)
        assert bool(gradient.abs().sum() > 0)


def test_word_gradients_are_what_a_word_changes_to_first_order(sd: Any) -> None:
    words = Words.of(sd)
    delta = torch.randn(1, 2, words.encoders[0].table.shape[1])
    table = words.encoders[0].table
    found = words.gradients([delta])
    assert found.shape == (1, 2, len(words.texts))
    assert float(found[0, 1, 7]) == pytest.approx(float(delta[0, 1] @ table[words.ids[0, 7]]), rel=1e-4)


def test_equal_prompts_share_a_gradient(sd: Any) -> None:
    words, template = Words.of(sd), Template((None, "a knife"))
    soft = SoftTokens(words.encoders, [template] * 3, ["cat a knife", "dog a knife", "cat a knife"])
    assert soft.first_of_equals() == [0, 1, 0]


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "kontext"])
def test_nothing_is_left_behind(name: str) -> None:
    pipe = tiny_pipeline(name)
    generator = generator_of(pipe)
    detector = detector_of(pipe)
    requests: list[Any] = cases_of()
    if name == "kontext":
        import numpy as np

        size = pipe.default_sample_size * pipe.vae_scale_factor
        generator = Generator(pipe, dict(generator.settings) | {"max_area": size * size, "_auto_resize": False})
        requests = [replace(case, image=np.zeros((size, size, 3), dtype=np.uint8)) for case in requests]
    target = model_target(generator, requests, 0.5)
    before = state_of(pipe)  # a first generation leaves traces of its own
    words = Words.of(pipe)
    hooks = [
        len(module._forward_hooks) for encoder in words.encoders for module in encoder.net.modules()
    ]  # transformers has some of its own
    soft = SoftTokens(words.encoders, [Template((None,))] * 2, ["cat", "dog"])
    with soft.added():
        look(generator, [DualLatent(detector=detector, guidance=InContext())], requests, View(target.latents, graph=True))
    assert_same_state(pipe, before, "after looking through a guard")
    assert [len(module._forward_hooks) for encoder in words.encoders for module in encoder.net.modules()] == hooks
    assert torch.is_grad_enabled()


def test_a_guard_that_fails_is_not_taken_for_one_that_was_seen(sd: Any) -> None:
    class Broken(Method):
        def denoise(self, call: Any, denoise: Any) -> Any:
            raise RuntimeError("broken")

    generator = generator_of(sd)
    target = model_target(generator, cases_of(), 0.0)
    before = state_of(sd)
    with pytest.raises(RuntimeError, match="broken"):
        look(generator, [Broken()], cases_of(), View(target.latents))
    assert_same_state(sd, before, "after a failure")


def test_a_step_that_never_comes_is_refused(sd: Any) -> None:
    generator = generator_of(sd)
    target = model_target(generator, cases_of(), 0.0)
    with pytest.raises(UnsupportedPipeline, match="ended before step 9"):
        look(generator, (), cases_of(), View(target.latents * 10))


def test_margins_are_kept_only_for_an_attack(sd: Any) -> None:
    generator, method = generator_of(sd), DualLatent(detector=detector_of(sd), guidance=InContext())
    with guard(sd, method) as handle:
        before = generator(cases_of())
        assert handle.run is not None
        assert handle.run.margins is None
    view = look(generator, [method], cases_of(), View(model_target(generator, cases_of(), 0.0).latents))
    assert [images for images, _ in view.margins] == [(0, 1)]
    with guard(sd, method):
        assert (generator(cases_of()) == before).all()


def test_the_bare_prediction_is_that_without_the_guard(generator: Generator) -> None:
    method = DualLatent(detector=detector_of(generator.pipe, 0.0), guidance=InContext(), safe_weight=1.0)
    cases = cases_of()
    latents = model_target(generator, cases, 0.0).latents
    alone, through = (look(generator, methods, cases, View(latents)) for methods in ((), (method,)))
    for seen in (Block(detector=method.detector), method):
        through = look(generator, [seen], cases, View(latents))
        assert through.bare is not None
        assert torch.allclose(through.bare, alone.guarded, atol=1e-5)
        assert not torch.allclose(through.guarded[0], alone.guarded[0], atol=1e-4)


def test_a_negative_prompt_does_not_stand_in_the_way(generator: Generator) -> None:
    target = model_target(generator, cases_of(), 0.25)
    view = look(generator, [NegativePrompt(words="a knife")], cases_of(), View(target.latents))
    assert view.margins == []
    assert torch.allclose(target.error(view.guarded), torch.zeros(2), atol=1e-3)


def test_targets_are_zero_for_the_prompt_and_one_for_none(generator: Generator) -> None:
    cases = cases_of()
    for make in (model_target, image_target):
        target = make(generator, cases, 0.5)
        assert len(target.latents) == 3
        seen = look(generator, (), cases, View(target.latents, blank=True))
        assert torch.allclose(target.error(seen.guarded), torch.zeros(2), atol=1e-3)
        if make is model_target:  # a picture of a model that was never trained may be no nearer to its prompt than to none
            assert torch.allclose(target.error(seen.empty), torch.ones(2), atol=1e-2)


def test_earlier_steps_are_spared_where_they_make_no_difference(sd: Any) -> None:
    generator, cases = generator_of(sd), cases_of()
    target, words = model_target(generator, cases, 0.5), Words.of(sd)
    for methods, spared in (
        ([DualLatent(detector=detector_of(sd), guidance=InContext())], True),
        ([SLD(concept="a knife", warmup=0)], False),
    ):
        objective = Objective(generator, methods, cases, target, words)
        objective.begin()
        assert objective.skim is spared


@pytest.mark.parametrize("name", ["dual_latent", "saferedir", "uvr", "safedig"])
def test_bundled_guards_tell_what_their_decisions_hang_on(name: str) -> None:
    generator = Generator(load_pipeline("testbed/flux"), dict(call_settings("testbed/flux")) | {"num_inference_steps": 4})
    unsafe, safe = find("testbed/weapons").cases(2), find("testbed/benign").cases(2)
    cases, methods = [*unsafe, *safe], build([name], "testbed/flux")
    with guard(generator.pipe, *methods) as handle:
        generator(cases)
    words = Words.of(generator.pipe)
    soft = SoftTokens(
        words.encoders,
        [Template((case.prompt.split()[0], None, " ".join(case.prompt.split()[2:]))) for case in cases],
        [case.prompt for case in cases],
    )
    with soft.added():
        view = look(generator, methods, cases, View(model_target(generator, cases, 0.0).latents, graph=True))
    images, margins = view.margins[0]
    assert images == (0, 1, 2, 3)
    assert [bool(margin > 0) for margin in margins] == [record.flagged for record in handle.records] == [True, True, False, False]
    assert any(
        bool(delta.abs().sum() > 0) for delta in torch.autograd.grad(margins.sum(), soft.deltas, allow_unused=True) if delta is not None
    )
