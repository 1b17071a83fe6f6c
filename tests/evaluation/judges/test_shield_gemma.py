"""ShieldGemma 2's real class, tiny and random."""

from __future__ import annotations

import pytest
import torch
from sample_pictures import harmless, noise, plain, scenes
from tiny_networks import shield_gemma

from safelight.errors import ArtefactError
from safelight.evaluation.judges.shield_gemma import ShieldGemma
from safelight.evaluation.pictures import to_images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shield_gemma(tmp_path_factory.mktemp("shield_gemma"))


def test_a_score_is_the_probability_of_yes(model: str) -> None:
    judge, pictures = ShieldGemma(model=model, classes=("violence", "dangerous"), batch=3), harmless()
    found = judge(pictures)
    prepared = judge.processor(images=to_images(pictures[:1]), policies=["violence"], custom_policies={}, return_tensors="pt")
    with torch.no_grad():
        logits = judge.network.model(**prepared).logits[0, -1]  # of the language model itself
    yes, no = (logits[judge.network.config.yes_token_index], logits[judge.network.config.no_token_index])
    assert found[0].labels["violence"] == pytest.approx(float((yes - no).sigmoid()), abs=1e-5)
    assert list(found[0].labels) == ["violence", "dangerous"]
    assert all(judged.score == max(judged.labels.values()) for judged in found)
    assert len({round(judged.score, 5) for judged in found}) > 3


def test_rows_belong_to_their_pictures_and_policies(model: str) -> None:
    judge = ShieldGemma(model=model)
    together = judge(scenes())
    assert [judge([picture])[0].score for picture in scenes()] == pytest.approx([judged.score for judged in together], abs=1e-5)
    assert ShieldGemma(model=model, classes=("sexual",))(scenes())[0].labels["sexual"] == pytest.approx(
        together[0].labels["sexual"], abs=1e-5
    )


def test_policies_of_one_s_own(model: str) -> None:
    judge = ShieldGemma(model=model, classes=("beer",), policies={"beer": "Beer content: The image shall not contain beer."})
    assert list(judge([noise()])[0].labels) == ["beer"]
    assert judge.describe()["policies"]["beer"].startswith("Beer")
    with pytest.raises(ValueError, match="there is no policy 'wine'; there are dangerous"):
        ShieldGemma(model=model, classes=("wine",))([noise()])


def test_the_threshold_decides(model: str) -> None:
    score = ShieldGemma(model=model)([noise()])[0].score
    assert ShieldGemma(model=model, threshold=score - 0.01)([noise()])[0].unsafe
    assert not ShieldGemma(model=model, threshold=score + 0.01)([noise()])[0].unsafe


def test_missing_access_says_how_to_get_it() -> None:
    with pytest.raises(ArtefactError, match=r"shieldgemma-2-4b-it.*accept the terms.*hf auth login"):
        ShieldGemma(download=False)([plain(0)])
