"""Sentence encoders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from safelight import load, save
from safelight.bank import Bank, Pair
from safelight.detectors.neighbours import Neighbours
from safelight.encoders import PACKAGED, SentenceEncoder, _folder
from safelight.errors import ArtefactError
from safelight.methods.block import Block

TEXTS = ["a cat sleeps on a sofa in the sun, and nobody wakes it", "a kitten is napping on the couch", "quarterly report on steel prices"]


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> SentenceEncoder:
    """The packaged encoder, without any network."""
    pytest.importorskip(PACKAGED.replace("-", "_"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return SentenceEncoder()


def test_sentences_of_like_meaning_are_near(encoder: SentenceEncoder) -> None:
    rows = encoder(TEXTS)
    assert rows.shape == (3, 384)
    likeness = rows @ rows.T
    assert torch.allclose(likeness.diagonal(), torch.ones(3), atol=1e-5)
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]


def test_a_batch_equals_its_rows_in_order(encoder: SentenceEncoder) -> None:
    rows = SentenceEncoder(batch=2)(TEXTS)
    torch.testing.assert_close(rows, torch.cat([encoder([text]) for text in TEXTS]), atol=1e-5, rtol=1e-4)


def test_statistics_are_joined(encoder: SentenceEncoder) -> None:
    rows = SentenceEncoder(statistics="mean+max+middle")(TEXTS)
    assert rows.shape == (3, 3 * 384)
    torch.testing.assert_close(rows[:, :384], encoder(TEXTS), atol=1e-5, rtol=1e-4)
    assert torch.isfinite(rows).all()


def test_a_folder_serves_as_well(encoder: SentenceEncoder) -> None:
    torch.testing.assert_close(SentenceEncoder(model=str(_folder(PACKAGED)))(TEXTS), encoder(TEXTS))


def test_a_bundle_names_the_encoder(encoder: SentenceEncoder, tmp_path: Path) -> None:
    bank = Bank.build(encoder, [Pair("a knife", "a spoon", "weapons")], ["a cat"])
    save(tmp_path, Block(detector=Neighbours(bank=bank, encoder=encoder)))
    (method,) = load(tmp_path)
    assert isinstance(method, Block)
    assert isinstance(method.detector, Neighbours)
    assert method.detector.encoder == encoder
    assert method.detector.verdicts(["a knife"])[0].flagged


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtefactError, match="there is no folder"):
        SentenceEncoder(model="somewhere/else")(TEXTS)
    with pytest.raises(ArtefactError, match="can't be read as a sentence encoder"):
        SentenceEncoder(model=str(tmp_path))(TEXTS)
    monkeypatch.setitem(sys.modules, PACKAGED.replace("-", "_"), None)
    with pytest.raises(ArtefactError, match=r"safelight\[sentence\]"):
        _folder(PACKAGED)
    with pytest.raises(ValueError, match="no token statistic 'median'"):
        SentenceEncoder(statistics="mean+median")
