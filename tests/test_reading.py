"""Judges read what the text encoders read, whatever was typed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from safelight import guard
from safelight.detector import Detector
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.reading import segments
from safelight.testbed.tokenizer import vocabulary
from safelight.testing import Containing, sample, tiny_pipeline

SAFE = "a cat on a beach"


class Whole(Detector[str]):
    """Flags one text and no other: what a detector that reads as far as the first end marker amounts to."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.seen: list[str] = []

    def __call__(self, items: Any) -> Tensor:
        self.seen += items
        return torch.tensor([float(item == self.text) for item in items])


def flagged(pipe: Any, detector: Any, prompts: Any, **changes: Any) -> list[bool]:
    with guard(pipe, Block(detector=detector)) as handle:
        sample(pipe, prompts, **changes)
    return [record.flagged for record in handle.records]


@pytest.mark.parametrize("marker", ["</s>", "<s>", "<pad>", "</s> <pad> <s>"])
def test_each_piece_between_typed_markers_is_judged(pipe: Any, marker: str) -> None:
    prompt = f"a cat {marker} a knife {marker}"
    for text in ("a knife", "a cat", "a cat a knife"):
        assert flagged(pipe, Whole(text), prompt) == [True], f"{text!r} is not judged, and the encoder reads it"
    assert flagged(pipe, Whole("a knife"), [SAFE, prompt, SAFE]) == [False, True, False], "the pieces of one prompt count for another"


def test_the_record_tells_what_was_read(sd: Any) -> None:
    with guard(sd, Block(detector=Containing())) as handle:
        sample(sd, ["a cat </s> a dog", SAFE])
    assert handle.records[0].read == ["a cat", "a dog", "a cat a dog"]
    assert handle.records[1].read == []


def test_an_ordinary_prompt_is_judged_once_and_as_it_was_typed(pipe: Any) -> None:
    detector = Whole("")
    flagged(pipe, detector, [SAFE, "A Cat, on a BEACH!", "a cat blorp"])
    assert detector.seen == [SAFE, "A Cat, on a BEACH!", "a cat blorp"]


@pytest.mark.parametrize(("name", "other"), [("flux", "prompt_2"), ("sd3", "prompt_2"), ("sd3", "prompt_3")])
def test_an_empty_prompt_hides_no_other(name: str, other: str) -> None:
    pipe = tiny_pipeline(name)
    refused = sample(pipe, "")
    with guard(pipe, Block(detector=Containing())) as handle:
        encoders: list[Any] = []
        encoder = pipe.text_encoder_2 if name == "flux" else pipe.text_encoder_3
        with torch.no_grad():
            hook = encoder.register_forward_pre_hook(lambda _, args: encoders.append(args[0].clone()))
            sample(pipe, "", **{other: "a knife"})
            hook.remove()
        assert handle.records[0].flagged
    knife = vocabulary()["knife"]
    if other != "prompt_2" or name == "flux":
        assert not (encoders[-1] == knife).any(), "the last that the encoder got still holds the unsafe prompt"
    assert refused is not None


def learn(pipe: Any, *words: str) -> None:
    table, ids = pipe.text_encoder.get_input_embeddings().weight, vocabulary()
    pipe.load_textual_inversion(torch.stack([table[ids[word]] for word in words]).clone(), token="<thing>")


@pytest.mark.parametrize("words", [["knife"], ["a", "knife"], ["spoon", "knife"], ["knife", "spoon"]])
def test_learned_tokens_are_read_as_the_words_they_are_like(words: list[str]) -> None:
    pipe = tiny_pipeline("sd")
    learn(pipe, *words)
    assert flagged(pipe, Containing(), ["a cat and a <thing>", SAFE]) == [True, False]


def test_learned_tokens_that_are_like_no_word_are_refused_by_who_reads_words() -> None:
    pipe = tiny_pipeline("sd")
    pipe.load_textual_inversion(torch.randn(2, 16) * 3, token="<thing>")
    with guard(pipe, Block(detector=Containing())) as handle:
        sample(pipe, ["a <thing> on a beach", SAFE])
    assert [record.flagged for record in handle.records] == [True, False]
    assert "no word comes near the learned token" in str(handle.records[0].actions[0].note)


def test_a_prompt_that_the_pipeline_rewrites_is_judged_as_rewritten(sd: Any) -> None:
    original = sd.encode_prompt

    def rewriting(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return original([f"{text} and a knife" for text in ([prompt] if isinstance(prompt, str) else prompt)], *args, **kwargs)

    sd.encode_prompt = rewriting
    assert flagged(sd, Containing(), [SAFE], negative_prompt=[""]) == [True]


def test_segments() -> None:
    assert segments([1, 5, 6, 2, 2, 7, 2], {1, 2}) == [[5, 6], [7]]
    assert segments([1, 2], {1, 2}) == []


def test_safe_guidance_starts_from_a_piece_that_is_harmless(sd: Any) -> None:
    class Note(DualLatent):
        seen: list[str] = []

        def begin(self) -> None:
            super().begin()
            self.seen[:] = self.run.plain_prompts

    with guard(sd, Note(detector=Containing())):
        sample(sd, ["a knife </s> a cat </s> a dog", "a knife </s> a knife", "a knife", "a cat"])
    assert Note.seen == ["a cat", "", "a knife", "a cat"]
