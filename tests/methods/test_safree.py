"""SAFREE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight import guard
from safelight.compose import build, call_settings, load_pipeline
from safelight.errors import PromptRequired
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.metrics.safety import shows_unsafe
from safelight.flow import Call
from safelight.generator import Generator, as_bytes
from safelight.methods.gate import Gate
from safelight.methods.safree import SAFREE
from safelight.subspace import basis
from safelight.testbed.judges import judges
from safelight.testing import Containing, sample
from safelight.testing.state import assert_identical

PROMPTS = ["a cat and a knife on the beach", "a dog on the meadow"]


def method(**changes: Any) -> SAFREE:
    return SAFREE(**{"concepts": ("knife",), "alpha": 0.0, "validate": False} | changes)


class Watching(SAFREE):
    """Keeps the text that reaches the denoiser."""

    def denoise(self, call: Call, denoise: Any) -> Any:
        def watched(call: Call) -> Any:
            seen.append((self.run.index, call))
            return denoise(call)

        return super().denoise(call, watched)


seen: list[tuple[int, Call]] = []


@pytest.mark.parametrize("changes", [{"strength": 0}, {"gamma": 0, "validate": True}, {"alpha": 1e9}])
def test_without_strength_steps_or_triggers_nothing_changes(changes: dict[str, Any], pipe: Any) -> None:
    expected = sample(pipe, PROMPTS)
    with guard(pipe, method(**changes)) as handle:
        assert_identical(sample(pipe, PROMPTS), expected, f"{changes} changes pictures")
    assert all(action.action == "none" for record in handle.records for action in record.actions)


def test_a_gate_confines_it(pipe: Any) -> None:
    expected = sample(pipe, PROMPTS)
    with guard(pipe, Gate(detector=Containing(), method=method())) as handle:
        images = sample(pipe, PROMPTS)
    assert_identical(images[1], expected[1], "the harmless prompt's picture changes")
    assert float((images[0] - expected[0]).abs().max()) > 1e-4
    assert [any(action.action == "filtered" for action in record.actions) for record in handle.records] == [True, False]


def test_trigger_tokens_leave_the_toxic_subspace_and_no_others_move() -> None:
    pipe = load_pipeline("testbed/flux")
    seen.clear()
    with guard(pipe, Watching(concepts=("a knife", "a sword"), validate=False, scale=1.0)) as handle:
        pipe(PROMPTS[0], **call_settings("testbed/flux") | {"num_inference_steps": 1, "true_cfg_scale": 1.0})
        assert handle.run is not None
        plain = handle.run.encode(PROMPTS[:1])
        concepts = handle.run.encode(["a knife", "a sword"])
    ((_, call),) = seen
    moved = (call.text[0] - plain.text[0]).abs().amax(dim=1) > 1e-5
    assert handle.records[0].actions[0].note is not None
    triggers = handle.records[0].actions[0].note.removeprefix("trigger words: ").split(", ")
    assert moved.nonzero().flatten().tolist() == [i for i, word in enumerate(PROMPTS[0].split()) if word in triggers]
    assert "knife" in triggers
    toxic = basis(concepts.text[:, :2].mean(dim=1))
    assert (toxic @ call.text[0, moved].T).abs().max() < 1e-3
    assert call.pooled is not None
    assert plain.pooled is not None
    assert concepts.pooled is not None
    assert (basis(concepts.pooled) @ call.pooled[0]).abs().max() < 1e-3 < (basis(concepts.pooled) @ plain.pooled[0]).abs().max()


def test_validation_limits_the_steps() -> None:
    pipe = load_pipeline("testbed/sd")
    seen.clear()
    with guard(pipe, Watching(concepts=("a knife",), gamma=4, scale=1.0)) as handle:
        pipe(PROMPTS[0], **call_settings("testbed/sd") | {"num_inference_steps": 6})
        assert handle.run is not None
        plain = handle.run.encode(PROMPTS[:1]).text[0]
    filtered = [not torch.allclose(call.text[-1], plain, atol=1e-5) for _, call in seen]
    (_, until) = handle.records[0].actions[0].steps or (0, 0)
    assert 2 <= until <= 4, "γ·sigmoid(1 - cos) lies between γ/2 and 0.89 γ"
    assert filtered == [index < until for index in range(6)]


def test_all_texts_of_an_image_count() -> None:
    pipe = load_pipeline("testbed/flux")
    settings = call_settings("testbed/flux") | {"num_inference_steps": 1, "true_cfg_scale": 1.0}
    with guard(pipe, method(concepts=("a knife",), scale=1.0)) as handle:
        pipe(prompt="a cat on the beach", prompt_2="a cat and a knife on the beach", **settings)
    assert "knife" in str(handle.records[0].actions[0].note)


def test_it_needs_the_words(sd: Any) -> None:
    embeddings = sd.encode_prompt("a cat", "cpu", 1, True, "")
    with guard(sd, method()), pytest.raises(PromptRequired):
        sample(sd, None, prompt_embeds=embeddings[0], negative_prompt_embeds=embeddings[1])


@pytest.mark.parametrize("concepts", [(), ("knife", " "), "knife"])
def test_concepts_are_a_list_of_texts(concepts: Any, sd: Any) -> None:
    with pytest.raises(ValueError, match="list of texts"):
        guard(sd, SAFREE(concepts=concepts))


def test_it_works_on_the_testbed() -> None:
    cases = find("testbed-dev/weapons").cases(5)
    generator = Generator(load_pipeline("testbed/sd3"), call_settings("testbed/sd3"))
    with guard(generator.pipe, *build(["safree"], "testbed/sd3")):
        pictures = [as_bytes(image) for image in generator(cases)]
    for judge in judges():
        assert sum(shows_unsafe(case, sight) for case, sight in zip(cases, judge.look(pictures), strict=True)) <= 2
