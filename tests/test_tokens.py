"""Where words are among tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.backbone import Backbone
from safelight.testbed.tokenizer import LENGTH, build
from safelight.testbed.world import words
from safelight.testing import tiny_pipeline
from safelight.tokens import extent, padded_length, word_spans

TOKENIZERS = {"clip": 1, "t5": 0}  # markers before the text


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.lists(st.sampled_from(words()), max_size=10).map(" ".join))
def test_each_word_has_its_tokens(kind: Any, text: str) -> None:
    tokenizer, start = build(kind), TOKENIZERS[kind]
    spans = word_spans(tokenizer, text)
    assert [tokenizer.decode(tokenizer(text).input_ids[span]) for span in spans] == text.split()
    assert extent(tokenizer, text) == slice(start, start + len(text.split()))


def test_a_word_that_the_tokenizer_drops_has_none() -> None:
    assert word_spans(build("clip"), "a  knife - on") == [slice(1, 2), slice(2, 3), slice(3, 3), slice(3, 4)]


class Subwords:
    """Cuts words into pieces of two letters, between two markers each."""

    model_max_length = 12

    def __call__(self, text: str, add_special_tokens: bool = True, padding: Any = None, max_length: int = 12, **_: Any) -> Any:
        ids = [hash(word[i : i + 2]) for word in text.split() for i in range(0, len(word), 2)]
        ids = [-1, -2, *ids, -3] if add_special_tokens else ids
        ids += [-4] * (max_length - len(ids)) if padding else []
        return type("Encoding", (), {"input_ids": ids})


def test_words_of_several_tokens() -> None:
    assert word_spans(Subwords(), "a knife here") == [slice(2, 3), slice(3, 6), slice(6, 8)]
    assert extent(Subwords(), "") == slice(2, 2)
    assert padded_length(Subwords()) == 12


def test_backbones_know_their_encoders(pipe: Any) -> None:
    backbone = Backbone.of(pipe)
    text = "a cat and a knife on the beach"
    embedded = backbone.embed([text], pipe.encode_prompt).text[0]
    other = backbone.embed([text.replace("knife", "spoon")], pipe.encode_prompt).text[0]
    for tokenizer, start in backbone.encoders:
        span = word_spans(tokenizer, text)[4]
        assert not embedded[start + span.start].allclose(other[start + span.start], atol=1e-5), "that is where the knife is"
    expected = {"StableDiffusion3Pipeline": [0, LENGTH]}.get(type(pipe).__name__, [0])
    assert [start for _, start in backbone.encoders] == expected


def test_sd3_without_t5() -> None:
    pipe = tiny_pipeline("sd3")
    pipe.tokenizer_3 = None
    assert len(Backbone.of(pipe).encoders) == 1
