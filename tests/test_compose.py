"""Guards by name."""

from __future__ import annotations

from typing import Any

import pytest

from safelight.compose import build, unsafe_words
from safelight.methods.negative_prompt import NegativePrompt
from safelight.methods.post_filter import PostFilter
from safelight.methods.safree import SAFREE
from safelight.methods.sld import PRESETS, SLD
from safelight.schema import field_of
from safelight.testbed.world import DOMAINS, UNSAFE


def one(name: str, *settings: str, pipeline: str = "testbed/sd", **options: Any) -> Any:
    (method,) = build([name], pipeline, settings, **options)
    return method


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_by_name(preset: str) -> None:
    method = one("sld", f"sld.preset={preset}", "sld.warmup=0.1")
    assert isinstance(method, SLD)
    wanted = PRESETS[preset]._asdict() | {"warmup": 0.1}
    assert {name: getattr(method, name) for name in wanted} == wanted
    assert method.concept == "a knife, a sword, a bomb, an axe"
    with pytest.raises(ValueError, match="preset='mild' is not one of weak, medium, strong, max"):
        one("sld", "sld.preset=mild")


def test_a_domain_tells_guards_what_is_unsafe() -> None:
    assert unsafe_words("testbed/flux") == DOMAINS["weapons"]
    assert one("safree", domain="substances").concepts == DOMAINS["substances"]
    assert one("negative_prompt", domain="substances").words == "a cigarette a syringe a pill a beer"
    assert one("sld", domain="substances").concept == "a cigarette, a syringe, a pill, a beer"
    assert one("post_filter", domain="substances").detector.unsafe == DOMAINS["substances"]
    assert one("post_filter").detector.unsafe == UNSAFE
    assert one("gate", "gate.method=safree", domain="substances").method.concepts == DOMAINS["substances"]
    with pytest.raises(ValueError, match="no domain 'toys'; there are weapons, substances"):
        one("sld", domain="toys")


def test_settings_win_over_what_guards_are_told() -> None:
    method = one("safree", "safree.concepts=knife, a sword", "safree.validate=true", "safree.alpha=0.1")
    assert isinstance(method, SAFREE)
    assert (method.concepts, method.validate, method.alpha) == (("knife", "a sword"), True, 0.1)
    assert one("post_filter", "image_classifier.unsafe=bomb", "image_classifier.threshold=0.9").detector.threshold == 0.9
    with pytest.raises(ValueError, match="no list of texts"):
        one("safree", "safree.concepts=knife,,sword")
    with pytest.raises(ValueError, match="Neighbours reads prompts"):
        one("post_filter", "post_filter.detector=neighbours")


def test_real_models_get_general_words_and_published_settings() -> None:
    words = unsafe_words("somebody/model")
    method = one("negative_prompt", pipeline="somebody/model")
    assert isinstance(method, NegativePrompt)
    assert method.words == ", ".join(words)
    published = one("safree", pipeline="somebody/model")
    assert (published.concepts, published.validate) == (words, True)
    with pytest.raises(ValueError, match="only the testbed has domains"):
        unsafe_words("somebody/model", "weapons")
    method = one(
        "post_filter", "image_classifier.pretrained=some/classifier", "image_classifier.unsafe=nsfw, gory", pipeline="somebody/model"
    )
    assert isinstance(method, PostFilter)
    assert method.detector.unsafe == ("nsfw", "gory")  # type: ignore[attr-defined]


def test_lists_of_texts_are_a_kind_of_field() -> None:
    field = field_of(SAFREE, "concepts")
    assert (field.kind, field.nonempty) == ("texts", True)
    assert field.parse("a knife") == ("a knife",)
