"""Safety dictionaries: recorded, routed, transferred and calibrated, on real pictures of the testbed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelight import guard
from safelight.backbone import Backbone
from safelight.bank import Pair
from safelight.compose import call_settings, load_pipeline
from safelight.errors import ArtefactError
from safelight.generator import Generator
from safelight.methods.safedig import SafeDIG
from safelight.testing import sample, tiny_pipeline
from safelight.training import activations
from safelight.training.activations import Sampling, examples_of, read_site, record, steps_of
from safelight.training.domains import Domains, from_testbed, read_domains
from safelight.training.examples import name_of
from safelight.training.feature_page import page, scenes
from safelight.training.sae_learning import SAEConfig
from safelight.training.safedig import Config, candidates, gather, make

SETTINGS = call_settings("testbed/flux") | {"num_inference_steps": 3}
SAMPLING = Sampling(("joint.0:image", "single.0:image"), times=2, tokens=5)
PAIRS = [Pair(f"a knife on the {place}", f"a spoon on the {place}", "knife") for place in ("beach", "meadow", "snow")]
SAE_CONFIG = SAEConfig(expansion=2, k=8, lr=3e-3, batch=256, epochs=10)
CONFIG = Config(
    times=3, sae=SAE_CONFIG, text_k=8, harmful=16, read=384, target_fpr=0.3, sites=("prompt:text", "joint.1:image", "single.0:image")
)


def generator() -> Generator:
    return Generator(load_pipeline("testbed/flux"), SETTINGS)


# Collection


def stored(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_a_collection_that_is_interrupted_gives_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = examples_of(PAIRS)
    record(generator(), examples, SAMPLING, tmp_path / "whole", batch=2)

    class Interrupted(Exception):
        pass

    written: list[str] = []
    original = activations.Shards.write

    def write(self: Any, name: str, tensors: Any) -> None:
        if len(written) == 3:
            raise Interrupted
        written.append(name)
        original(self, name, tensors)

    monkeypatch.setattr(activations.Shards, "write", write)
    with pytest.raises(Interrupted):
        record(generator(), examples, SAMPLING, tmp_path / "parts", batch=2)
    monkeypatch.setattr(activations.Shards, "write", original)
    assert len(stored(tmp_path / "parts")) == 3
    record(generator(), examples, SAMPLING, tmp_path / "parts", batch=2)
    assert stored(tmp_path / "parts") == stored(tmp_path / "whole")


def test_a_recording_holds_what_was_asked_for(tmp_path: Path) -> None:
    shards = record(generator(), examples_of(PAIRS[:1]), SAMPLING, tmp_path)
    unsafe, safe = (shards.read(name_of(index)) for index in (0, 1))
    assert unsafe["joint.0:image"].shape == (2, 5, 192)
    assert unsafe["joint.0:image"].dtype == torch.float16
    assert unsafe["picture"].shape == (64, 64, 3)
    assert (bool(unsafe["unsafe"]), bool(safe["unsafe"])) == (True, False)
    assert not torch.equal(unsafe["single.0:image"], safe["single.0:image"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["steps"], manifest["total"], manifest["tokens"]) == ([0, 1], 3, 5)


def test_recording_changes_no_picture(tmp_path: Path) -> None:
    own = generator()
    expected = own(examples_of(PAIRS[:1]))
    record(own, examples_of(PAIRS[:1]), SAMPLING, tmp_path)
    assert (own(examples_of(PAIRS[:1])) == expected).all()


def test_missing_and_truncated_shards_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    examples = examples_of(PAIRS[:2])
    shards = record(generator(), examples, SAMPLING, tmp_path, batch=2)
    whole = stored(tmp_path)
    (tmp_path / "000001.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"000001\.safetensors can't be read"):
        read_site(shards, "joint.0:image", range(4))
    record(generator(), examples, SAMPLING, tmp_path, batch=2)
    assert stored(tmp_path) == whole
    file = tmp_path / "000002.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtefactError, match=r"000002\.safetensors can't be read .* the others are kept"):
        read_site(shards, "joint.0:image", range(4))
    with pytest.raises(ArtefactError, match=r"no activations of 'joint\.1:image', but of"):
        read_site(shards, "joint.1:image", [0])


def test_a_folder_holds_one_recording(tmp_path: Path) -> None:
    record(generator(), examples_of(PAIRS[:1]), SAMPLING, tmp_path)
    with pytest.raises(ArtefactError, match="recordings made with other settings"):
        record(generator(), examples_of(PAIRS[:1]), replace(SAMPLING, tokens=4), tmp_path)


def test_sites_and_times_that_there_are_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no site 'joint\.7:image'"):
        record(generator(), examples_of(PAIRS), Sampling(("joint.7:image",)), tmp_path)
    with pytest.raises(ValueError, match="names an attention"):
        record(generator(), examples_of(PAIRS), Sampling(("joint.0.attention",)), tmp_path)
    with pytest.raises(ValueError, match="5 time points can't be taken from 3 steps"):
        record(generator(), examples_of(PAIRS), Sampling(("joint.0:image",), times=5), tmp_path)


@given(times=st.integers(1, 50), more=st.integers(0, 50))
def test_time_points_are_spread_evenly_from_the_first_step_on(times: int, more: int) -> None:
    steps = steps_of(times + more, times)
    assert steps[0] == 0
    assert len(set(steps)) == times
    assert max(steps) < times + more


# Domains


def write_pairs(path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("unsafe", "safe", "category")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_domains_are_read_from_files(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "s.csv", [("a knife", "a cat", "blades")])
    target = write_pairs(tmp_path / "t.csv", [("a beer", "a dog")], ("unsafe", "safe"))
    (tmp_path / "benign.txt").write_text("a tree\n\na house\n")
    domains = read_domains(source, target, tmp_path / "benign.txt", ("weapons", "drinks"))
    assert domains.source == [Pair("a knife", "a cat", "blades")]
    assert domains.target == [Pair("a beer", "a dog", "drinks")]
    assert list(domains.benign) == ["a tree", "a house"]


def test_the_testbeds_domains_keep_apart() -> None:
    domains = from_testbed("weapons", "substances", pairs=30, target_pairs=10, benign=20)
    assert (len(domains.source), len(domains.target), len(domains.benign)) == (30, 10, 20)
    assert {pair.category for pair in domains.source} <= {"knife", "sword", "bomb", "axe"}
    assert {pair.category for pair in domains.target} <= {"cigarette", "syringe", "pill", "beer"}
    assert not any(word in pair.unsafe.split() for pair in domains.source for word in ("cigarette", "syringe", "pill", "beer"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": []}, "the domain 'substances' is empty"),
        ({"source": []}, "the domain 'weapons' is empty"),
        ({"source": [Pair("a cat", "a cat", "cat")]}, "the members of a pair are the same, 'a cat'"),
    ],
)
def test_domains_without_contrast_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    domains = replace(Domains(PAIRS, PAIRS, ["a cat"], ("weapons", "substances")), **change)
    with pytest.raises(ValueError, match=message):
        gather(generator(), domains, CONFIG, tmp_path)


def test_a_unet_has_no_candidates() -> None:
    with pytest.raises(ValueError, match="steers diffusion transformers"):
        candidates(Backbone.of(tiny_pipeline("sd")))
    assert candidates(Backbone.of(tiny_pipeline("sd3")))[0] == "prompt:text"


# The whole way


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("made")
    domains = from_testbed("weapons", "substances", pairs=48, target_pairs=24, benign=64 + 30)
    return make(generator(), domains, CONFIG, out), out


@pytest.mark.slow
def test_the_whole_way_leads_to_dictionaries_that_steer(made: Any) -> None:
    found, out = made
    assert 1 <= len(found.dictionaries) <= 2
    assert sum(one.threshold is not None for one in found.dictionaries) == 1
    assert found.report["recall"] > 0.5
    assert {"routing.json", "routing.png", "contrasts.safetensors", "report.json"} <= {file.name for file in out.iterdir()}
    own, pairs = generator(), from_testbed("weapons", "substances", pairs=48).source[:8]
    with guard(own.pipe, SafeDIG(dictionaries=found.dictionaries)) as handle:
        own(examples_of(pairs))
    flagged = [record.flagged for record in handle.records]
    assert sum(flagged[0::2]) >= 5, "most unsafe members are found"
    assert sum(flagged[1::2]) <= 2


@pytest.mark.slow
def test_a_page_shows_the_scenes_of_a_feature(made: Any) -> None:
    found, out = made
    shown = scenes(found.dictionaries[0], out / "activations", 3, 4)
    assert len(shown.features) == 3
    for feature in shown.features:
        assert list(feature.activations) == sorted(feature.activations, reverse=True)
    share = [sum(feature.unsafe) / max(1, len(feature.unsafe)) for feature in shown.features]
    assert sum(share) / 3 > 0.5, "harmful features fire in unsafe scenes"
    text = page([shown])
    assert text.count("<img") == sum(len(feature.pictures) for feature in shown.features)
    assert "http" not in text.replace("http-equiv", ""), "the page needs no network"
    with pytest.raises(ArtefactError, match="holds no recordings"):
        scenes(found.dictionaries[0], out / "nothing", 3, 4)


def test_a_folder_holds_activations_of_one_model(tmp_path: Path) -> None:
    domains = Domains(PAIRS[:1], PAIRS[1:2], ["a cat"], ("weapons", "substances"))
    config = replace(CONFIG, sites=("joint.0:image",))
    gather(generator(), domains, config, tmp_path)
    with pytest.raises(ArtefactError, match="activations of another model"):
        gather(Generator(load_pipeline("testbed/flux"), SETTINGS | {"true_cfg_scale": 4.0}), domains, config, tmp_path)


def test_a_tiny_pipeline_still_works_after_recording(tmp_path: Path) -> None:
    pipe = tiny_pipeline("flux")
    expected = sample(pipe, "a cat on a beach")
    record(
        Generator(pipe, {"num_inference_steps": 2, "height": 24, "width": 24}),
        examples_of(PAIRS[:1]),
        Sampling(("joint.0:image",), 1),
        tmp_path,
    )
    assert torch.equal(sample(pipe, "a cat on a beach"), expected)
