"""Nearest neighbours."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safelight.bank import Bank, Pair
from safelight.calibration import Calibration
from safelight.detectors.neighbours import Neighbours
from safelight.errors import ArtefactError

PAIRS = [Pair("a knife on the beach", "a spoon on the beach", "weapons"), Pair("a beer in the snow", "a juice in the snow", "substances")]
SAFE = ["a cat on the beach", "a tree in the snow"]
PLACES = ("on the beach", "in the snow", "by the sea", "at night", "in a meadow")
ANIMALS = ("cat", "dog", "fish", "horse", "bird", "cow")


def bag_of_words(prompts: Sequence[str], salt: str = "") -> Tensor:
    """A text encoder for tests: a random vector for each word, summed; [prompts, 64]."""

    def vector(word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256((salt + word).encode()).digest()[:4], "big")
        return torch.randn(64, generator=torch.Generator().manual_seed(seed))

    return torch.stack([torch.stack([vector(word) for word in prompt.split() or [""]]).sum(dim=0) for prompt in prompts])


def other_encoder(prompts: Sequence[str]) -> Tensor:
    return bag_of_words(prompts, salt="other")


class Pipeline:
    """A context whose pooled embeddings come from the given encoder."""

    def __init__(self, encoder: object = bag_of_words) -> None:
        self.pool = encoder


@pytest.fixture
def bank() -> Bank:
    return Bank.build(bag_of_words, PAIRS, SAFE)


def test_known_prompts_get_their_label(bank: Bank) -> None:
    verdicts = Neighbours(bank=bank, encoder=bag_of_words).verdicts([PAIRS[0].unsafe, PAIRS[1].unsafe, PAIRS[0].safe, SAFE[0]])
    assert [verdict.flagged for verdict in verdicts] == [True, True, False, False]
    assert [verdict.concept for verdict in verdicts] == ["weapons", "substances", None, None]


def test_cosine_votes_are_the_softmax_of_likeness(bank: Bank) -> None:
    texts = ["a knife in the snow", "a cat by the sea"]
    likeness = torch.nn.functional.normalize(bag_of_words(texts), dim=1) @ bank.embeddings.T
    nearest = likeness.topk(3, dim=1)
    expected = ((nearest.values / 0.05).softmax(dim=1) * (bank.labels[nearest.indices] > 0)).sum(dim=1)
    torch.testing.assert_close(Neighbours(bank=bank, k=3, encoder=bag_of_words)(texts), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "discriminant"])
def test_scores_lie_between_0_and_1_for_any_k(metric: str) -> None:
    bank = Bank.build(bag_of_words, PAIRS, SAFE, metric=metric)
    for k in (1, 3, 1000):
        scores = Neighbours(bank=bank, k=k, encoder=bag_of_words)(["", "something else entirely", "a knife"])
        assert bool(((scores >= 0) & (scores <= 1.00001)).all())
    assert len(Neighbours(bank=bank, encoder=bag_of_words)([])) == 0
    assert Neighbours(bank=bank, encoder=bag_of_words).verdicts([]) == []


def scenes(things: Sequence[str]) -> list[str]:
    return [f"a {animal} and a {thing} {place}" for animal, thing, place in itertools.product(ANIMALS, things, PLACES)]


def test_the_discriminant_metric_finds_one_unsafe_thing_among_safe_ones() -> None:
    """Neighbours by cosine share animal and place; what matters is the other thing."""
    held_out = {
        f"a {animal} and a {thing} {place}" for animal, place in (("cat", PLACES[0]), ("cow", PLACES[3])) for thing in ("knife", "spoon")
    }
    unsafe = [text for text in scenes(["knife"]) if text not in held_out]
    safe = [text for text in scenes(["spoon", "tree", "house", "umbrella", "apple", "car", "flower"]) if text not in held_out]
    pairs = [Pair(text, "", "weapons") for text in unsafe[::3]]
    found = {
        metric: Neighbours(bank=Bank.build(bag_of_words, pairs, safe, metric=metric), encoder=bag_of_words)(sorted(held_out))
        for metric in ("cosine", "discriminant")
    }
    truth = torch.tensor(["knife" in text for text in sorted(held_out)])
    assert bool((found["discriminant"][truth] > 0.9).all())
    assert bool((found["discriminant"][~truth] < 0.1).all())
    assert float(found["discriminant"][truth].min()) > float(found["cosine"][truth].min())


def test_embeddings_that_are_nan_raise(bank: Bank) -> None:
    def sometimes(prompts: Sequence[str]) -> Tensor:
        return bag_of_words(prompts) * (torch.nan if "broken" in prompts else 1)

    with pytest.raises(ValueError, match="not finite"):
        Neighbours(bank=bank, encoder=sometimes)(["broken"])


def test_an_encoder_the_bank_was_not_made_with_is_refused(bank: Bank) -> None:
    with pytest.raises(ArtefactError, match="another encoder"):
        Neighbours(bank=bank, encoder=other_encoder)(["a cat"])
    with pytest.raises(ArtefactError, match="another encoder"):
        Neighbours(bank=bank).within(Pipeline(other_encoder))(["a cat"])  # type: ignore[arg-type]


def test_a_replaced_encoder_is_checked_anew(bank: Bank) -> None:
    detector = Neighbours(bank=bank, encoder=bag_of_words)
    detector(["a cat"])
    with pytest.raises(ArtefactError, match="another encoder"):
        replace(detector, encoder=other_encoder)(["a cat"])


def test_outside_of_a_pipeline_it_needs_an_encoder(bank: Bank) -> None:
    detector = Neighbours(bank=bank)
    for use in (lambda: detector(["a cat"]), lambda: detector.verdicts(["a cat"]), lambda: detector.calibrate(["a cat"])):
        with pytest.raises(ValueError, match=r"no encoder of its own.*encoder="):
            use()


def test_within_a_pipeline_it_uses_its_encoder_and_stays_as_it_was(bank: Bank) -> None:
    detector = Neighbours(bank=bank)
    bound = detector.within(Pipeline())  # type: ignore[arg-type]
    assert bound.verdicts([PAIRS[0].unsafe])[0].flagged
    assert detector.encoder is None
    own = Neighbours(bank=bank, encoder=bag_of_words)
    assert own.within(Pipeline(other_encoder)) is own  # type: ignore[arg-type]


def test_calibrate_sets_the_threshold(bank: Bank) -> None:
    benign = [f"{thing} number {index} {place}" for index in range(80) for thing, place in zip(ANIMALS, PLACES, strict=False)]
    detector = Neighbours(bank=bank, encoder=bag_of_words)
    fitted = detector.calibrate(benign)
    assert detector.calibration is fitted
    assert detector.threshold == fitted.threshold
    assert sum(verdict.flagged for verdict in detector.verdicts(benign)) == fitted.flagged
    assert fitted.bound <= 0.01


def test_a_bank_brings_its_calibration(bank: Bank, tmp_path: Path) -> None:
    replace(bank, calibration=Calibration.fit([index / 400 * 0.7 for index in range(400)])).save(tmp_path / "bank.safetensors")
    detector = Neighbours(bank=Bank.load(tmp_path / "bank.safetensors"))
    assert detector.threshold == pytest.approx(0.7 * 399 / 400)
    assert Neighbours(bank=detector.bank, threshold=0.9).threshold == 0.9
