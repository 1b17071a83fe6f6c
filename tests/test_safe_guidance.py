"""Where a flagged sample is led instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.bank import Bank, Pair
from safelight.detector import Verdict
from safelight.flow import Embedding
from safelight.run import Run
from safelight.safe_guidance import Arithmetic, InContext, NearestTwin, Rewrite, token_shifts

PAIRS = [
    Pair("a knife on a beach", "a spoon on a beach", "weapons"),
    Pair("a bomb at night", "a firework at night", "weapons"),
    Pair("a beer in the snow", "a juice in the snow", "substances"),
]


def verdict(concept: str | None = "weapons", **facts: Any) -> Verdict:
    return Verdict(1.0, 0.5, True, concept, **facts)


def test_a_context_is_added_in_words(run: Run) -> None:
    given = InContext("peaceful", by_category={"weapons": "with a flower"})
    (prompt,) = run.prompts
    for concept, words in (("weapons", "with a flower"), ("substances", "peaceful"), (None, "peaceful")):
        assert torch.equal(given(run, [0], [verdict(concept)]).text, run.encode(f"{prompt}, {words}").text)


def test_a_rewrite_is_taken_from_the_verdict(run: Run) -> None:
    texts = Rewrite("a cat")(run, [0, 0, 0], [verdict(safe_prompt="a dog"), verdict(), verdict(safe_prompt="")]).text
    assert torch.allclose(texts, run.encode(["a dog", "a cat", ""]).text, atol=1e-6)


def test_the_nearest_twin_is_safe(run: Run) -> None:
    guidance = NearestTwin(Bank.build(run.pool, PAIRS, ["a cat on a beach"]))
    assert torch.equal(guidance(run, [0], [verdict()]).text, run.encode("a spoon on a beach").text)


def test_arithmetic_needs_shifts(run: Run) -> None:
    with pytest.raises(ValueError, match="holds no token shifts; build it from pairs"):
        Arithmetic(Bank.build(run.pool, PAIRS))(run, [0], [verdict()])
    with pytest.raises(ValueError, match="no pair has a safe member"):
        token_shifts(run, [Pair("a knife", "", "weapons")])


def test_arithmetic_turns_a_known_prompt_into_its_twin(run: Run) -> None:
    shifts = token_shifts(run, PAIRS)
    assert shifts.pooled is None, "SD has no pooled embedding"
    bank = Bank.build(run.pool, PAIRS).with_shifts(*shifts)
    moved = Arithmetic(bank, k=1)(run, [0], [verdict()])
    assert isinstance(moved, Embedding)
    own, twin = run.encode("a knife on a beach").text, run.encode("a spoon on a beach").text
    assert (moved.text - twin).norm() < 0.1 * (own - twin).norm()


def test_shifts_are_thinned_out_and_a_third_is_of_words_that_move_most(run: Run) -> None:
    every = token_shifts(run, PAIRS)
    some = token_shifts(run, PAIRS, limit=6)
    assert len(some.tokens) == len(some.shifts) == 6
    assert len(every.tokens) > 6
    known = {tuple(row) for row in every.tokens.tolist()}
    assert all(tuple(row) in known for row in some.tokens.tolist())
    far = every.shifts.norm(dim=1).max() / 2
    assert int((some.shifts.norm(dim=1) > far).sum()) == min(2, int((every.shifts.norm(dim=1) > far).sum()))
