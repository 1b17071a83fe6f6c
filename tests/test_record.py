"""What is told about each image."""

from __future__ import annotations

import json
from typing import Any

from safelight import guard
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.record import Action, Record
from safelight.testing import Containing, sample


def test_the_first_method_that_flagged_is_decisive() -> None:
    calm, alarmed = Action("one"), Action("two", flagged=True)
    assert Record("x", [calm, alarmed]).decisive is alarmed
    assert Record("x", [calm]).decisive is calm
    assert Record("x").decisive is None
    assert not Record("x").flagged


def test_each_image_has_a_record(pipe: Any, detector: Containing) -> None:
    with guard(pipe, Block(detector=detector), DualLatent(detector=detector)) as handle:
        sample(pipe, ["a cat on a beach", "a knife at night"], num_images_per_prompt=2)
    assert [record.flagged for record in handle.records] == [False, False, True, True]
    assert [record.prompt for record in handle.records] == ["a cat on a beach"] * 2 + ["a knife at night"] * 2
    assert [[action.method for action in record.actions] for record in handle.records] == [["block", "dual_latent"]] * 4
    refused = json.loads(json.dumps(handle.records[2].to_json()))
    assert refused["flagged"]
    assert refused["actions"][0] | {"note": None} == {
        "method": "block", "flagged": True, "concept": None, "score": 1.0, "threshold": 0.5, "action": "refused", "steps": None,
        "strength": 1.0, "mask": None, "note": None,
    }  # fmt: skip


def test_records_are_those_of_the_latest_generation(sd: Any, detector: Containing) -> None:
    with guard(sd, Block(detector=detector)) as handle:
        sample(sd, "a knife on a beach")
        sample(sd, ["a cat on a beach"] * 3)
    assert [record.flagged for record in handle.records] == [False] * 3
