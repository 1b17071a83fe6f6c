"""A LLaVA of the real class whose answer is written into its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_pictures import harmless, noise, plain
from tiny_networks import llava

from safelight.errors import ArtefactError
from safelight.evaluation.judges.llava_guard import CATEGORIES, NOTHING, LlavaGuard, instruction, parse

WEAPONS = "O6: Weapons or Substance Abuse"


def saying(folder: Path, rating: str, category: str) -> str:
    return llava(folder, [f'{{"rating": "{rating}",', f'"category": "{category}",', '"rationale": "a beer"}'])


@pytest.fixture(scope="module")
def unsafe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saying(tmp_path_factory.mktemp("unsafe"), "Unsafe", WEAPONS)


def test_an_unsafe_rating_is_read(unsafe: str) -> None:
    found = LlavaGuard(model=unsafe, batch=4)(harmless())
    assert all((judged.unsafe, judged.score, judged.labels) == (True, 1.0, {WEAPONS: 1.0}) for judged in found)
    assert len(found) == len(harmless())


def test_a_safe_rating_is_read(tmp_path: Path) -> None:
    judged = LlavaGuard(model=saying(tmp_path, "Safe", NOTHING))([noise()])[0]
    assert (judged.unsafe, judged.score, judged.labels) == (False, 0.0, {})


def test_only_the_categories_asked_for_count(unsafe: str) -> None:
    judged = LlavaGuard(model=unsafe, classes=(CATEGORIES[0],))([noise()])[0]
    assert (judged.unsafe, judged.labels) == (False, {WEAPONS: 1.0})
    assert LlavaGuard(model=unsafe, classes=(WEAPONS,))([noise()])[0].unsafe


def test_an_unsafe_rating_without_a_known_category_counts(tmp_path: Path) -> None:
    assert LlavaGuard(model=saying(tmp_path, "Unsafe", NOTHING), classes=(CATEGORIES[0],))([noise()])[0].unsafe


def test_an_answer_that_rates_nothing_raises(tmp_path: Path, unsafe: str) -> None:
    with pytest.raises(ValueError, match="did not rate the picture, but answered 'I see a beer'"):
        LlavaGuard(model=llava(tmp_path, ["I see", "a beer"]))([noise()])
    with pytest.raises(ValueError, match="did not rate"):
        LlavaGuard(model=unsafe, tokens=1)([noise()])


@pytest.mark.parametrize(
    "answer",
    [
        "", "Safe", '"rating": "Safe", "category": "x"', '{"rating": "safe", "category": "x"}', '{"rating": "Unsafe"}', '{"category": "x"}',
        '{"rating": "Unsafe", "category": ""}', '{"rating": true, "category": "x"}',
    ],
)  # fmt: skip
def test_no_other_form_is_taken_for_a_rating(answer: str) -> None:
    with pytest.raises(ValueError, match="did not rate"):
        parse(answer)


def test_a_rationale_that_was_cut_off_is_no_harm() -> None:
    assert parse('{\n    "rating": "Unsafe",\n    "category": "O2: Violence, Harm, or Cruelty",\n    "rationale": "The') == (
        True,
        CATEGORIES[1],
    )


def test_the_instruction_names_every_category_and_the_form() -> None:
    assert all(instruction().count(name) == 2 for name in CATEGORIES)
    assert '"rating": str<"Unsafe"|"Safe">' in instruction()


def test_missing_access_says_how_to_get_it() -> None:
    with pytest.raises(ArtefactError, match=r"LlavaGuard-v1.2-0.5B-OV-hf.*fill in the form.*torchvision"):
        LlavaGuard(download=False)([plain(0)])
