"""A list of words."""

from __future__ import annotations

import copy
import pickle
import re
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight import load, save
from safelight.compose import build
from safelight.detectors.keywords import Keywords, parse_words
from safelight.methods.block import Block
from safelight.words import UNSEEN, as_read

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


@given(st.text(alphabet=st.characters(categories=["L"]), min_size=1).filter(lambda word: as_read(word).strip(UNSEEN)))
def test_a_word_is_found_by_itself(word: str) -> None:
    assert Keywords(words={"any": [word]}).verdicts([f"so: {word}."])[0].flagged


TAGS = Keywords(
    words={"weapons": ("knife", "machine gun", "gun", "kill", "ak-47", "9mm", "刀", "ナイフ", "ガス", "มีด", "칼", "🔪", "c++", "don't")}
)


def flagged(text: str, detector: Keywords = TAGS) -> bool:
    return detector.verdicts([text])[0].flagged


@pytest.mark.parametrize(
    "text",
    [
        "holding_knife, 1girl", "knife_(weapon)", "2knife", "knife2", "(knife:1.3)", "<lora:knife:1>", "holdingKnife", "XMLKnife", "kNiFe",
        "machine_gun", "machine-gun", "machine \n gun", "machinegun", "MachineGun", "m a c h i n e gun", "ak47", "AK 47", "don’t", "dont",
        "k n i f e", "k-n-i-f-e", "a k.n.i.f.e", "⒦⒩⒤⒡⒠", "ⓚⓝⓘⓕⓔ", "𝓴𝓷𝓲𝓯𝓮", "一把刀在桌上", "桌上有刀。", "ナイフを持つ猫", "ﾅｲﾌ", "ｶﾞｽ",
        "มีดบนโต๊ะ", "칼을 든 사람", "식칼", "한 자루의 \u110f\u1161\u11af", "手里knife", "cut🔪!", "c++ code", "k\u20e3n\u20e3i\u20e3f\u20e3e\u20e3",
    ],
)  # fmt: skip
def test_words_are_those_of_the_tokenizers(text: str) -> None:
    assert flagged(text)


@pytest.mark.parametrize(
    "text",
    ["shotgun", "skill", "penknife", "knifelike", "knives", "knifes", "begun", "KNIFEs", "19mm", "9mmx", "k nife", "kn ife", "kn.ife", "มด", "カス",
     "총", "machine, or gum", "c code", "Vénus", "a kn\nife"],
)  # fmt: skip
def test_neighbours_of_words_are_left_alone(text: str) -> None:
    assert not flagged(text)


def test_accents_within_a_word_separate_nothing() -> None:
    detector = Keywords(words={"any": ["nus", "sum", "été"]})
    assert not any(flagged(text, detector) for text in ("Vénus", "re\u0301sume\u0301", "résumé"))
    assert flagged("ete", detector)


IGNORABLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u115f\u1160\u3164\uffa0\ufe0f\u180b\U000e0100\U000e0041\u202e\u061c\u0007\0\u0008\u007f\x1c\u0488\u20dd\u2800\ud800\ue000\u0378"
"""Format, filling, control, private, unassigned and enclosing characters: a word with one of them looks like itself, or nearly."""
ACCENTS = "\u0301\u0336\u0489\u0345"


@settings(max_examples=300, deadline=None)
@given(
    word=st.sampled_from(["knife", "machine gun", "刀", "ナイフ", "มีด", "칼", "ガス", "ak-47"]),
    drawn=st.data(),
    around=st.sampled_from(["{}", "a {} b", "猫{}猫"]),
)
def test_nothing_unseen_hides_a_word(word: str, drawn: st.DataObject, around: str) -> None:
    hidden = "".join(letter + "".join(drawn.draw(st.lists(st.sampled_from(IGNORABLE), max_size=2))) for letter in ("", *word))
    assert flagged(around.format(hidden)), ascii(hidden)


@settings(max_examples=100, deadline=None)
@given(word=st.sampled_from(["knife", "gun", "kill"]), place=st.integers(1, 5), mark=st.sampled_from(ACCENTS))
def test_no_accent_hides_a_word(word: str, place: int, mark: str) -> None:
    assert flagged(f"a {word[:place]}{mark}{word[place:]} b")


@given(
    word=st.sampled_from(["knife", "machine gun", "刀", "ナイフ", "มีด", "칼"]),
    before=st.text("猫在桌上のを持つไก่บน사람은"),
    behind=st.text("猫在桌上の持つไกบน사람은"),
)
def test_scripts_without_spaces_hide_no_word(word: str, before: str, behind: str) -> None:
    assert flagged(before + word + behind)


@given(text=st.text(st.characters(categories=["L", "N"], codec="ascii"), max_size=12).map(str.lower))
def test_whole_words_only(text: str) -> None:
    assert flagged(text) == bool(
        re.search(r"(?<![a-z])(knife|gun|kill|machinegun|dont)(?![a-z])|(?<![a-z])ak47(?!\d)|(?<!\d)9mm(?![a-z])", text)
    )


def test_ten_thousand_words_take_no_longer_than_one() -> None:
    random = Random(0)
    names = ["".join(random.choices("abcdefghijklmnop", k=random.randint(4, 12))) for _ in range(10_000)]
    detector = Keywords(words={"any": names})
    prompts = [" ".join(random.choices(["a", "photograph", "of", "cats", "étude", "刀"], k=25)) for _ in range(1_000)]
    start = time.perf_counter()
    detector(prompts)
    detector(["a " * 5_000, "a\u200b" * 5_000, "刀" * 5_000])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "has no words"),
        ({"weapons": []}, "has no words"),
        ({"weapons": ["knife", " "]}, "words['weapons'] holds ' ', which is no word"),
        ({"weapons": ["knife", None]}, "words['weapons'] holds None, which is no word"),
        ({"weapons": ["\u200b"]}, "no letter, digit or sign"),
        ({"weapons": "knife"}, "words['weapons']='knife' is no list of words; give categories"),
        ({"weapons": 3}, "words['weapons']=3 is no list of words"),
        (
            ["knife"],
            "words=['knife'] has no categories; give categories with their words, e.g. words={'weapons': ['knife', 'machine gun']}",
        ),
        ("knife", "words='knife' has no categories"),
        (None, "words=None has no categories"),
    ],
)
def test_lists_that_make_no_sense_raise(words: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Keywords(words=words)


def test_a_list_cannot_change_unseen() -> None:
    assert Keywords(words={"weapons": {"sword", "knife"}}).words == {"weapons": ("knife", "sword")}  # type: ignore[dict-item]
    words = {"weapons": ["knife"]}
    detector = Keywords(words=words)
    words["weapons"].append("sword")
    assert detector.words == {"weapons": ("knife",)}
    with pytest.raises(TypeError):
        detector.words["weapons"] = ("sword",)  # type: ignore[index]
    for copied in (copy.copy(detector), copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert copied.words == detector.words
        assert flagged("a knife", copied)


def test_the_first_category_and_then_the_first_place_count() -> None:
    detector = Keywords(words={"a": ["cat", "machine gun", "machine"], "b": ["dog"]})
    assert [detector.verdicts([text])[0].note for text in ("dog cat", "machine-gun, cat")] == [
        "found the word 'cat'",
        "found the word 'machine gun'",
    ]


def test_a_list_can_be_given_as_text() -> None:
    assert parse_words("knife, machine gun") == {"words": ["knife", "machine gun"]}
    assert parse_words("weapons:knife|axe,drugs: pill") == {"weapons": ["knife", "axe"], "drugs": ["pill"]}
    (method,) = build(["block"], "mine", ["block.detector=keywords", "keywords.words=weapons:knife|axe", "keywords.threshold=0.4"])
    assert isinstance(method, Block)
    assert method.detector.verdicts(["an axe"])[0].concept == "weapons"
    for text, told in (("keywords.words=", "holds '', which is no word"), ("keywords.words=a:b|", "holds ''")):
        with pytest.raises(ValueError, match=told):
            build(["block"], "mine", ["block.detector=keywords", text])
    with pytest.raises(ValueError, match=r"needs --set keywords\.words="):
        build(["block"], "mine", ["block.detector=keywords"])


def test_a_bundle_keeps_the_list(tmp_path: Path) -> None:
    save(tmp_path, Block(detector=Keywords(words=WORDS)))
    (method,) = load(tmp_path)
    assert isinstance(method, Block)
    assert isinstance(method.detector, Keywords)
    assert method.detector.words == WORDS
    assert method.detector.verdicts(["a sword"])[0].concept == "weapons"
