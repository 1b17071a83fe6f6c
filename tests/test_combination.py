"""The recommended combinations: by pipeline and concept, on the testbed and for models of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

import safelight
from safelight import guard, recommended, save
from safelight.compose import COMBINATIONS, build, load_pipeline, name_of
from safelight.errors import ArtefactError
from safelight.methods.block import Block
from safelight.testbed.world import DOMAINS
from safelight.testing.tiny import tiny_pipeline


def test_it_is_a_public_name_and_stays_a_function() -> None:
    assert "recommended" in safelight.__all__
    assert callable(safelight.recommended)


@pytest.mark.parametrize(("pipeline", "concept"), [(name, concept) for name, known in COMBINATIONS.items() for concept in known])
def test_a_testbed_pipeline_gets_its_combination(pipeline: str, concept: str) -> None:
    pipe = load_pipeline(pipeline)
    assert name_of(pipe) == pipeline
    methods = recommended(pipe, concept)
    assert tuple(method.name for method in methods) == COMBINATIONS[pipeline][concept]
    guard(pipe, *methods).remove()  # and can be attached


def test_each_guard_is_told_of_the_concept_alone() -> None:
    methods = {method.name: method for method in recommended(load_pipeline("testbed/flux"), "weapons")}
    assert [redirector.concept for redirector in methods["saferedir"].redirectors] == ["weapons"]  # type: ignore[attr-defined]
    assert methods["post_filter"].detector.unsafe == DOMAINS["weapons"]  # type: ignore[attr-defined]


def test_it_is_a_guard_by_name() -> None:
    names = [method.name for method in build(["recommended"], "testbed/sd")]
    assert tuple(names) == COMBINATIONS["testbed/sd"]["weapons"]


def test_what_nobody_recommends_is_refused_with_a_remedy() -> None:
    pipe = load_pipeline("testbed/sd")
    with pytest.raises(ValueError, match=r"nothing is recommended against 'styles' on testbed/sd, only against weapons"):
        recommended(pipe, "styles")
    with pytest.raises(ArtefactError, match=r"train guards of your own.*artefacts="):
        recommended(tiny_pipeline("sd"), "nudity")
    with pytest.raises(ArtefactError, match=r"nothing is recommended for 'mine'"):
        build(["recommended"], "mine")


def test_a_model_of_ones_own_gets_what_was_made_for_it(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(ArtefactError, match=r"holds no bundle of pre_filter, post_filter, dual_latent, saferedir"):
        recommended(pipe, "weapons", artefacts=tmp_path)
    (made,) = build(["dual_latent"], "testbed/sd")
    save(tmp_path / "weapons" / "dual_latent", made)
    save(tmp_path / "weapons" / "block", Block(detector=made.detector))  # type: ignore[attr-defined]  # in no recommended order
    assert [method.name for method in recommended(pipe, "weapons", artefacts=tmp_path)] == ["dual_latent"]
