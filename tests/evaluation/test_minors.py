"""Rows that may sexualise a minor. All texts here are harmless: it is the label that makes a row sexual."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.evaluation.lists.minors import AGE_WORDS, SEXUAL_WORDS, VERSION, mentions_minor, sexualises_minor

MENTIONS = [
    "a girl reading a book",
    "a G1RL reading",
    "a gírl reading",
    "ＧＩＲＬ with a hat",
    "a girls' choir",
    "a g.i.r.l with a kite",
    "a g i r l with a kite",
    "a gi\u200brl with a kite",
    "a gіrl with a kite",  # the i is Cyrillic
    "a giiiirl with a kite",
    "young_girl",
    "a schoo1girl",
    "a school-girl",
    "middle school",
    "the ch1ldren's book",
    "a t33nager",
    "a k1d!",
    "babies asleep",
    "a 12 year old reading",
    "a 12-year-old",
    "twelve years old",
    "a reader, 17yo",
    "aged 15",
    "age: 9",
    "she is 16",
]
OTHERS = [
    "a woman aged 34",
    "a 25 year old",
    "18 years old",
    "17 apples",
    "the boyfriend of a man",
    "kidney beans",
    "a sonata",
    "the minority",
    "boycott",
    "a painting of 1830",
    "a person reading a book",
    "",
]


@pytest.mark.parametrize("text", MENTIONS)
def test_a_mention_drops_a_row_whose_label_is_sexual(text: str) -> None:
    assert mentions_minor(text)
    assert sexualises_minor(text, ["sexual"])
    assert sexualises_minor(text, ["violence", "Nudity"])
    assert sexualises_minor(text, sexual=True)


@pytest.mark.parametrize("text", MENTIONS)
def test_the_same_row_stays_under_another_label(text: str) -> None:
    assert not sexualises_minor(text, ["violence", ""])


@pytest.mark.parametrize("text", OTHERS)
def test_others_stay(text: str) -> None:
    assert not mentions_minor(text)
    assert not sexualises_minor(text, ["sexual"], sexual=True)


@pytest.mark.parametrize("group", ["girl", "boy", "Girls", "b0y", "child", "teen"])
def test_who_is_shown_drops_a_row_whatever_it_says(group: str) -> None:
    assert sexualises_minor("reading a book", group=group)


@pytest.mark.parametrize("group", ["woman", "man", "person", "church", ""])
def test_other_groups_stay(group: str) -> None:
    assert not sexualises_minor("reading a book", group=group)


def test_labels_can_name_a_minor_too() -> None:
    assert sexualises_minor("reading a book", ["sexual", "child"])


@given(
    word=st.sampled_from([phrase for line in AGE_WORDS.strip().splitlines() for phrase in line.split("|")]),
    before=st.sampled_from(["", "a ", "(", "one, ", "THE "]),
    after=st.sampled_from(["", " reading", ".", ", painted", ")"]),
    upper=st.booleans(),
)
def test_every_word_counts_in_any_case_and_place(word: str, before: str, after: str, upper: bool) -> None:
    assert sexualises_minor(before + (word.upper() if upper else word) + after, ["sexual"])


@given(st.text(max_size=80))
def test_any_text_can_be_judged(text: str) -> None:
    assert sexualises_minor(text, sexual=True) == mentions_minor(text)
    assert sexualises_minor(f"{text} a girl reading", ["sexual"])


@given(st.integers(0, 99))
def test_ages_below_eighteen_count(age: int) -> None:
    assert mentions_minor(f"somebody, {age} years old") == (age < 18)


def test_other_words_need_another_version() -> None:
    """Another rule keeps other rows: bump the version, load the public lists, and freeze their hashes anew (`protocols.py`)."""
    assert (VERSION, hashlib.sha256((AGE_WORDS + SEXUAL_WORDS).encode()).hexdigest()[:16]) == ("1", "ec77c08450a7fd3a")
