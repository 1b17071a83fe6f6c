"""A list of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import load, save
from safelight.detectors.keywords import Keywords
from safelight.methods.block import Block

WORDS = {"weapons": ("knife", "kitchen axe", "sword"), "substances": ("café noir",)}


@pytest.mark.parametrize(
    ("text", "concept"),
    [
        ("a knife on the beach", "weapons"),
        ("A KNIFE!", "weapons"),
        ("knife", "weapons"),
        ("a kni\u0301fe", "weapons"),
        ("a \uff4b\uff4e\uff49\uff46\uff45", "weapons"),  # letters of full width
        ("a kn\u200bife", "weapons"),  # an invisible space
        ("a kitchen\n  axe", "weapons"),
        ("a cafe noir", "substances"),
        ("CAFÉ NOIR", "substances"),
        ("a penknife", None),
        ("knives", None),
        ("an axe", None),
        ("", None),
    ],
)
def test_whole_words_are_found_however_they_are_written(text: str, concept: str | None) -> None:
    (verdict,) = Keywords(words=WORDS).verdicts([text])
    assert verdict.concept == concept
    assert verdict.flagged == (concept is not None)
    assert verdict.score == float(concept is not None)


def test_the_note_names_the_word() -> None:
    (verdict,) = Keywords(words=WORDS).verdicts(["one Sword, two"])
    assert verdict.note == "found the word 'sword'"


@given(st.lists(st.text(), max_size=5))
def test_scores_are_those_of_the_verdicts(texts: list[str]) -> None:
    detector = Keywords(words=WORDS)
    assert detector(texts).tolist() == [verdict.score for verdict in detector.verdicts(texts)]


@given(st.text(alphabet=st.characters(categories=["L"]), min_size=1))
def test_a_word_is_found_by_itself(word: str) -> None:
    assert Keywords(words={"any": [word]}).verdicts([f"so: {word}."])[0].flagged


@pytest.mark.parametrize("words", [{}, {"weapons": []}, {"weapons": ["knife", " "]}, {"weapons": "knife"}])
def test_lists_that_make_no_sense_raise(words: Any) -> None:
    with pytest.raises(ValueError, match="word"):
        Keywords(words=words)


def test_a_bundle_keeps_the_list(tmp_path: Path) -> None:
    save(tmp_path, Block(detector=Keywords(words=WORDS)))
    (method,) = load(tmp_path)
    assert isinstance(method, Block)
    assert isinstance(method.detector, Keywords)
    assert method.detector.words == WORDS
    assert method.detector.verdicts(["a sword"])[0].concept == "weapons"
