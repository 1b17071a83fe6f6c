"""A method and its weights in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight import Method, bundle, guard
from safelight.bank import Bank, Pair
from safelight.detectors.llm import LanguageModel
from safelight.detectors.neighbours import Neighbours
from safelight.errors import ArtefactError
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.gate import Gate
from safelight.methods.negative_prompt import NegativePrompt
from safelight.run import Run
from safelight.safe_guidance import InContext, NearestTwin, Rewrite
from safelight.testing import Containing, sample


def saved(folder: Path, **changes: Any) -> Path:
    bundle.save(folder, DualLatent(detector=Containing(), **changes), made_for="FluxPipeline")
    return folder


def test_fields_survive(tmp_path: Path) -> None:
    guidance = InContext("peaceful", by_category={"weapons": "with flowers"})
    method = DualLatent(detector=Containing(word="sword"), guidance=guidance, until=0.4, coupling="free")
    bundle.save(tmp_path, Gate(detector=Containing(), method=NegativePrompt(words="knife")), method)
    gate, dual = bundle.load(tmp_path)
    assert isinstance(gate, Gate)
    assert isinstance(gate.method, NegativePrompt)
    assert gate.method.words == "knife"
    assert isinstance(dual, DualLatent)
    assert isinstance(dual.detector, Containing)
    assert (dual.detector.word, dual.guidance, dual.until, dual.coupling) == ("sword", guidance, 0.4, "free")


def test_a_bank_is_stored_once_and_without_pickle(tmp_path: Path, sd: Any, run: Run) -> None:
    pairs = [
        Pair("a knife on a beach", "a spoon on a beach", "weapons"),
        Pair("a bomb at night", "a firework at night", "weapons"),
    ]
    bank = Bank.build(run.pool, pairs, ["a cat on a beach"])
    method = DualLatent(detector=Neighbours(bank=bank, k=1), guidance=NearestTwin(bank))
    bundle.save(tmp_path, method)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bank-0.safetensors", "method.json"]
    images = []
    for methods in ([method], bundle.load(tmp_path)):
        with guard(sd, *methods) as handle:
            images.append(sample(sd, "a knife on a beach"))
        assert handle.records[0].flagged
    assert torch.allclose(*images, atol=1e-5)


def test_a_bundle_for_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ArtefactError, match="was made for FluxPipeline, not for StableDiffusionPipeline"):
        bundle.load(tmp_path, made_for="StableDiffusionPipeline")
    assert bundle.load(tmp_path, made_for="FluxPipeline")
    assert bundle.load(tmp_path)


def test_fields_can_be_changed(tmp_path: Path) -> None:
    (method,) = bundle.load(saved(tmp_path), changes={"dual_latent.until": 0.3, "containing.word": "axe"})
    assert isinstance(method, DualLatent)
    assert isinstance(method.detector, Containing)
    assert (method.until, method.detector.word) == (0.3, "axe")
    with pytest.raises(ValueError, match=r"has no field 'dual_latent\.untl'"):
        bundle.load(tmp_path, changes={"dual_latent.untl": 0.3})


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is no bundle"):
        bundle.load(tmp_path / "nothing")
    file = saved(tmp_path) / "method.json"
    document = json.loads(file.read_text())
    for broken, message in (
        ("{", "is no bundle"),
        (json.dumps(document | {"format": "other/1"}), "has the format 'other/1'"),
        (json.dumps(document | {"methods": [{"kind": "pickle", "name": "x"}]}), "unknown kind of part: 'pickle'"),
        (json.dumps(document | {"methods": [{"kind": "bank", "file": "../secret"}]}), "points outside the bundle"),
        (
            json.dumps(document | {"methods": [{"kind": "method", "name": "negative_prompt", "fields": {"wrods": "x"}}]}),
            "doesn't fit this version",
        ),
    ):
        file.write_text(broken)
        with pytest.raises(ArtefactError, match=message):
            bundle.load(tmp_path)


def test_what_can_not_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bundle can't store"):
        bundle.save(tmp_path, Method())
    with pytest.raises(ValueError, match="a bundle can't store"):
        bundle.save(tmp_path, Block(detector=Containing(word=object())))  # type: ignore[arg-type]


def test_rewrite_is_stored(tmp_path: Path) -> None:
    (method,) = bundle.load(saved(tmp_path, guidance=Rewrite("a cat")))
    assert isinstance(method, DualLatent)
    assert method.guidance == Rewrite("a cat")


def test_where_keys_are_sent_is_not_a_bundles_business(tmp_path: Path) -> None:
    model = LanguageModel(base_url="http://127.0.0.1:9/v1", model="m", api_key_env="SECRET")
    bundle.save(tmp_path, Block(detector=model))
    text = (tmp_path / "method.json").read_text()
    assert "SECRET" not in text
    assert "127.0.0.1" not in text
    (block,) = bundle.load(tmp_path, changes={"llm.base_url": "http://127.0.0.1:8/v1"})
    assert block.detector.base_url == "http://127.0.0.1:8/v1"
    (tmp_path / "method.json").write_text(text.replace('"model": "m"', '"model": "m", "api_key_env": "HOME"'))
    with pytest.raises(ArtefactError, match=r"llm.api_key_env, which only you may set"):
        bundle.load(tmp_path, changes={"llm.base_url": "http://127.0.0.1:8/v1"})
