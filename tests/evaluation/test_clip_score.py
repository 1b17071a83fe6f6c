"""CLIP scores with a tiny random CLIP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sample_pictures import noise, plain, scenes
from tiny_networks import clip

from safelight.errors import ArtefactError
from safelight.evaluation.clip import Clip
from safelight.evaluation.metrics.clip_score import clip_ratio, clip_score, scores
from safelight.evaluation.pictures import to_images

PROMPTS = ["a cat", "a knife", "a cat", "a good cat", "bad"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(model=clip(tmp_path_factory.mktemp("clip")), batch=2)


def pictures(seed: int = 0) -> list[np.ndarray]:
    return [*scenes(), noise(seed=seed), plain(90)]


def test_scores_are_clip_s_own_cosines(network: Clip) -> None:
    prepared = network.processor(text=PROMPTS, images=to_images(pictures()), padding=True, return_tensors="pt")
    with torch.no_grad():
        cosines = network.network(**prepared).logits_per_image.diagonal() / network.network.logit_scale.exp()
    assert scores(PROMPTS, pictures(), network) == pytest.approx((100 * cosines.clamp(min=0)).tolist(), abs=1e-3)
    assert bool((cosines < 0).any())  # the clamp is seen at work
    assert bool((cosines > 0).any())


def test_the_estimate_is_over_prompts(network: Clip) -> None:
    found = clip_score(PROMPTS, pictures(), network)
    assert found.value == pytest.approx(np.mean(scores(PROMPTS, pictures(), network)))
    assert found.n == 4
    assert found.low <= found.value <= found.high


def test_the_ratio_compares_the_same_prompts(network: Clip) -> None:
    assert clip_ratio(PROMPTS, pictures(), pictures(), network)[:3] == (1.0, 1.0, 1.0)
    before, after = (sum(scores(PROMPTS, pictures(seed), network)) for seed in (0, 3))
    found = clip_ratio(PROMPTS, pictures(), pictures(3), network)
    assert found.value == pytest.approx(after / before)
    assert found.n == 4


@pytest.mark.parametrize(("prompts", "shown"), [([], []), (["a cat"], []), (["a cat", "a dog"], [noise()])])
def test_bad_input_raises(network: Clip, prompts: list[str], shown: list[np.ndarray]) -> None:
    for figure in (lambda: clip_score(prompts, shown, network), lambda: clip_ratio(prompts, shown, shown, network)):
        with pytest.raises(ValueError, match=r"give at least one, and the prompt of each"):
            figure()
    with pytest.raises(ValueError, match="give at least one"):
        clip_ratio(["a cat"], [noise()], [], network)


def test_long_prompts_are_cut_off(network: Clip) -> None:
    assert len(scores(["a cat " * 100], [noise()], network)) == 1


def test_missing_weights_say_how_to_get_them() -> None:
    with pytest.raises(ArtefactError, match=r"the metric 'clip_score' can't load openai/clip-vit-large-patch14.*hf download"):
        clip_score(["a cat"], [noise()], Clip(download=False))
