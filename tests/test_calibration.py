"""Thresholds with a guarantee."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from safelight.calibration import Calibration, items_needed, upper_bound

SCORES = st.lists(st.floats(0, 1, allow_nan=False), min_size=100, max_size=400)
COARSE = st.lists(st.integers(0, 4).map(lambda value: value / 4), min_size=100, max_size=400)


@given(st.integers(1, 500), st.data(), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_bound_is_that_of_clopper_and_pearson(n: int, data: st.DataObject, confidence: float) -> None:
    events = data.draw(st.integers(0, n))
    reference = binomtest(events, n, alternative="less").proportion_ci(confidence, method="exact").high
    assert upper_bound(events, n, confidence) == pytest.approx(reference, abs=1e-9)


def test_the_bound_of_distinct_scores_belongs_to_the_count_flagged() -> None:
    fitted = Calibration.fit([index / 1000 for index in range(1000)], 0.02)
    assert fitted.flagged > 0
    assert fitted.bound == upper_bound(fitted.flagged, 1000)
    assert fitted.bound <= 0.02 < upper_bound(fitted.flagged + 1, 1000)


@settings(max_examples=40)
@given(st.one_of(SCORES, COARSE), st.sampled_from([0.03, 0.05, 0.2]))
def test_no_smaller_threshold_would_do(scores: list[float], target: float) -> None:
    fitted = Calibration.fit(scores, target)
    assert fitted.flagged == sum(score > fitted.threshold for score in scores)
    assert fitted.bound <= target
    below = [score for score in scores if score < fitted.threshold]
    looser = sum(score > max(below) for score in scores) if below else len(scores)
    smaller = sum(score >= fitted.threshold for score in scores)  # what any threshold just below flags, at the least
    assert looser >= smaller
    assert upper_bound(smaller, len(scores)) > target


def test_the_rate_promised_is_kept_on_fresh_data_also_with_ties() -> None:
    generator, broken, trials = random.Random(0), 0, 300
    weights = (0.9, 0.06, 0.025, 0.01, 0.005)
    for _ in range(trials):
        fitted = Calibration.fit(generator.choices(range(5), weights, k=200), 0.05)
        broken += sum(weight for value, weight in enumerate(weights) if value > fitted.threshold) > fitted.bound
    assert broken / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


@given(st.sampled_from([0.005, 0.01, 0.05, 0.2]), st.sampled_from([0.9, 0.95, 0.99]))
def test_too_few_items_raise_and_the_message_names_how_many_are_needed(target: float, confidence: float) -> None:
    needed = items_needed(target, confidence)
    scores = [index / needed for index in range(needed)]
    with pytest.raises(ValueError, match=f"at least {needed}, or a higher target"):
        Calibration.fit(scores[1:], target, confidence)
    assert Calibration.fit(scores, target, confidence).flagged == 0


def test_one_per_cent_takes_299_items() -> None:
    assert items_needed(0.01) == 299
    with pytest.raises(ValueError, match="at least 299"):
        Calibration.fit([])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_raise(wrong: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        Calibration.fit([0.1] * 400 + [wrong])


@pytest.mark.parametrize(("target", "confidence"), [(0, 0.95), (1, 0.95), (0.01, 0), (0.01, 1), (5, 0.95)])
def test_targets_that_are_no_shares_raise(target: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Calibration.fit([0.1] * 400, target, confidence)


def test_it_is_told_in_words_and_in_json_and_knows_its_data() -> None:
    scores = [index / 400 for index in range(400)]
    fitted, other = (Calibration.fit(scores, items=items) for items in (["a"] * 400, ["b"] * 400))
    assert Calibration(**json.loads(fitted.to_json())) == fitted
    assert "0 of 400 benign items flagged" in str(fitted)
    assert "with 95% confidence" in str(fitted)
    assert fitted.data != other.data


@given(st.lists(st.floats(0, 1), min_size=60, max_size=80), st.floats(-1, 3), st.floats(0, 1))
def test_a_threshold_moves_towards_unsafe_scores_but_never_down(scores: list[float], weakest: float, margin: float) -> None:
    fitted = Calibration.fit(scores, 0.05)
    moved = fitted.towards(weakest, margin, scores)
    assert fitted.threshold <= moved.threshold <= max(fitted.threshold, weakest) + 1e-12
    assert moved.flagged == sum(score > moved.threshold for score in scores) <= fitted.flagged
    assert moved.bound == fitted.bound
