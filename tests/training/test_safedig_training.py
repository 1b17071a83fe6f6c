"""Safety dictionaries: recorded, routed, transferred and calibrated, on real pictures of the testbed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safelight import guard
from safelight.backbone import Backbone
from safelight.bank import Pair
from safelight.compose import call_settings, load_pipeline
from safelight.errors import ArtefactError
from safelight.generator import Generator
from safelight.methods.safedig import SafeDIG
from safelight.nets.sae import SAE
from safelight.testing import sample, tiny_pipeline
from safelight.training import activations
from safelight.training.activations import Sampling, examples_of, read_site, record, steps_of
from safelight.training.domains import Domains, from_testbed, read_domains
from safelight.training.examples import name_of
from safelight.training.feature_page import page, scenes
from safelight.training.harm import alarm, harmful_features, statistics
from safelight.training.routing import Candidate, Contrasts, Proxy, Weights, choose, group_of, pooled, route, semantics, stability
from safelight.training.sae_learning import SAEConfig
from safelight.training.safedig import Config, candidates, gather, make
from safelight.training.transfer import Domain, TransferConfig, adapt

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


# Routing


def contrasts(pairs: int = 12, seed: int = 0) -> Contrasts:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(pairs) % 3
    themes = torch.randn(3, 6, generator=generator)
    clear = themes[kinds][:, None] + 0.1 * torch.randn(pairs, 2, 6, generator=generator)
    shifts = {"joint.0:image": clear, "joint.1:image": torch.randn(pairs, 2, 6, generator=generator), "prompt:text": clear * 0.5}
    updates = {f"{site}|{operator}": torch.rand(pairs, 2, generator=generator) for site in shifts for operator in ("blend", "repel")}
    foretold = {key: 0.1 if "joint.1" in key else 0.5 for key in updates}
    return Contrasts(shifts, kinds, foretold, updates, {k: v * 0.1 for k, v in updates.items()}, dict.fromkeys(shifts, 0.01))


GROUPS = {"joint.0:image": "binding", "joint.1:image": "binding", "prompt:text": "text"}


def test_routing_prefers_what_tells_categories_apart_and_is_reproducible(tmp_path: Path) -> None:
    found = route(contrasts(), GROUPS)
    assert next(one for one in found.chosen if one.group == "binding").site == "joint.0:image"
    contrasts().save(tmp_path / "contrasts.safetensors")
    again = route(Contrasts.load(tmp_path / "contrasts.safetensors"), GROUPS)
    assert again.rows() == found.rows()
    assert 0 <= found.steady <= 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.integers(1, 2))
def test_at_most_one_position_of_a_group_is_chosen(rows: list[tuple[str, float, float]], positions: int) -> None:
    known = [Candidate(str(i), group, "blend", one, two, 0.0, 0.0) for i, (group, one, two) in enumerate(rows)]
    chosen = choose(known, Weights(), positions)
    assert len({one.group for one in chosen}) == len(chosen) <= positions
    best = max(one.score(Weights()) for one in known)
    assert chosen[0].score(Weights()) == best


def test_weights_decide() -> None:
    semantic, bound = Candidate("a", "x", "blend", 1, 0, 0, 0), Candidate("b", "x", "blend", 0, 1, 0, 0)
    assert choose([semantic, bound], Weights(), 1) == [bound]
    assert choose([semantic, bound], Weights(semantics=1.0), 1) == [semantic]


def test_activations_without_contrast_are_refused() -> None:
    same = contrasts()
    with pytest.raises(ValueError, match=r"the same activations at 'joint\.1:image'"):
        route(replace(same, shifts={**same.shifts, "joint.1:image": torch.zeros(12, 2, 6)}), GROUPS)


@given(seed=st.integers(0, 50), angle=st.floats(0.2, 3))
@settings(max_examples=25, deadline=None)
def test_what_follows_from_the_activations_is_foretold(seed: int, angle: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    safe = torch.randn(24, 2, 8, 5, generator=generator)
    carries = torch.rand(24, 2, 8, 1, generator=generator) < 0.3
    bound = safe + carries * torch.tensor([6.0, angle, 0, 0, 0])
    free = safe + carries * torch.randn(24, 2, 8, 5, generator=generator)
    for operator in ("blend", "repel"):
        assert Proxy(bound, safe).foretold(bound, safe, operator) > 0.3, operator
        assert Proxy(free, safe).foretold(free, safe, operator) < 0.3, operator


def test_tokens_that_differ_more_count_more() -> None:
    safe = torch.zeros(1, 1, 3, 2)
    unsafe = torch.tensor([[[[-1.0, 0.0], [0.0, 0.0], [0.0, -0.1]]]])
    torch.testing.assert_close(pooled(unsafe, safe), torch.tensor([[[1.0, 0.001]]]) / 1.01)


def test_the_scores_mean_what_they_say() -> None:
    kinds = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    directions = torch.eye(2)[kinds]
    assert semantics(directions, kinds) == pytest.approx(1)
    assert semantics(torch.ones(8, 2), kinds) == pytest.approx(0)
    assert stability(torch.ones(4, 3)) == pytest.approx(1)
    assert stability(torch.tensor([0.0, 0.0, 0.0, 8.0])) < 0.3


def test_the_proxies_move_towards_safe_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    safe = torch.randn(6, 2, 4, 5, generator=generator)
    unsafe = safe + torch.tensor([3.0, 0, 0, 0, 0])
    proxy = Proxy(unsafe, safe)
    for operator in ("blend", "repel"):
        assert float(proxy.updates(unsafe, operator).mean()) > float(proxy.updates(safe, operator).mean())
    direction = torch.tensor([1.0, 0, 0, 0, 0])
    taken = proxy.change(unsafe, "repel")
    assert float((taken @ direction).max()) <= 1e-3, "Repel takes away, and adds nothing"


def test_groups_follow_the_blocks() -> None:
    assert group_of("prompt:text", 2, 4) == "text"
    assert group_of("joint.1:image", 2, 4) == "binding"
    assert group_of("single.0:image", 2, 4) == "rendering"
    assert [group_of(f"joint.{i}:image", 4, 0) for i in range(4)] == ["binding", "binding", "binding", "rendering"]


# Transfer


def an_sae(width: int = 6, latents: int = 12) -> SAE:
    torch.manual_seed(0)
    return SAE(width, latents, 4).eval().requires_grad_(False)


def domain(count: int = 300, seed: int = 0) -> Domain:
    generator = torch.Generator().manual_seed(seed)
    safe = torch.randn(count, 6, generator=generator)
    return Domain(safe + torch.tensor([2.0, 0, 0, 0, 0, 0]), safe)


def features(sae: SAE, tokens: Tensor) -> Tensor:
    return sae.features(sae.inward(tokens)).values


def test_transfer_leaves_the_encoder_as_it_was() -> None:
    sae, source, target = an_sae(), domain(), domain(seed=1)
    before, seen = {name: value.clone() for name, value in sae.state_dict().items() if value is not None}, features(sae, target.unsafe)
    adapted = adapt(sae, sae.decoder, target, source, TransferConfig())
    assert not torch.equal(adapted.weight, sae.decoder.weight)
    assert all(torch.equal(value, sae.state_dict()[name]) for name, value in before.items())
    assert torch.equal(features(sae, target.unsafe), seen)
    assert {"b_pre", "encoder.weight", "encoder.bias"} <= set(sae.frozen())


def test_transfer_solves_its_problem_exactly() -> None:
    sae, target = an_sae(), domain()
    adapted = adapt(sae, sae.decoder, target, None, TransferConfig(closeness=0.01))

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        z = torch.cat([features(sae, target.unsafe), features(sae, target.safe)]).double()
        wanted = torch.cat([target.safe, target.safe]).double()
        return (wanted - z @ weight - bias).square().sum(1).mean() + 0.01 * (weight - sae.decoder.weight.double()).square().sum()

    weight, bias = adapted.weight.double().requires_grad_(), adapted.bias.double().requires_grad_()
    loss(weight, bias).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4
    assert float(bias.grad.abs().max()) < 1e-4


def test_the_published_objective_reconstructs() -> None:
    sae, target = an_sae(), domain()
    published = adapt(sae, sae.decoder, target, None, TransferConfig(objective="reconstruct", closeness=1e-6))
    repaired = adapt(sae, sae.decoder, target, None, TransferConfig(closeness=1e-6))
    z = features(sae, target.unsafe)
    assert float((published(z) - target.unsafe).square().mean()) < float((repaired(z) - target.unsafe).square().mean())
    assert float((repaired(z) - target.safe).square().mean()) < float((published(z) - target.safe).square().mean())


def test_replay_keeps_the_source() -> None:
    sae, source, target = an_sae(), domain(seed=2), domain(20, seed=3)
    far = Domain(target.unsafe * 3, target.safe * 3 + 1)
    start = adapt(sae, sae.decoder, source, None, TransferConfig())
    z = features(sae, source.unsafe)

    def missed(replay: float) -> float:
        adapted = adapt(sae, start, far, source, TransferConfig(replay=replay))
        return float((adapted(z) - source.safe).square().mean())

    assert missed(0.5) < missed(0.2) < missed(0.0)


def test_a_target_without_contrast_is_refused() -> None:
    sae, same = an_sae(), domain()
    with pytest.raises(ValueError, match="target domain is empty"):
        adapt(sae, sae.decoder, Domain(torch.zeros(0, 6), torch.zeros(0, 6)), None, TransferConfig())
    with pytest.raises(ValueError, match="have the same activations"):
        adapt(sae, sae.decoder, Domain(same.safe, same.safe), None, TransferConfig())


# Harmful features


def members(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    safe = torch.randn(count, 2, 5, 6, generator=generator)
    unsafe = safe.clone()
    unsafe[:, :, 0] += torch.tensor([4.0, 0, 0, 0, 0, 0])
    return unsafe, safe


def test_harmful_features_fire_for_unsafe_members() -> None:
    sae, (unsafe, safe) = an_sae(), members()
    found, known = harmful_features(sae, [(unsafe, safe)], 3), statistics(sae, unsafe, safe)
    assert found.features.shape == (2, 3)
    for time in range(2):
        assert bool((known.unsafe[time, found.features[time]] > known.safe[time, found.features[time]]).all())
    with pytest.raises(ValueError, match="no feature fires more"):
        harmful_features(sae, [(safe, safe)], 3)


def test_the_alarm_tells_unsafe_pictures_from_safe_ones() -> None:
    sae, (unsafe, safe) = an_sae(), members(40)
    made = alarm(sae, [(unsafe[::2], safe[::2])], safe[::2], [0, 1], 6)
    scores = [made.scores(sae, sae.inward(tokens[1::2, 0])) for tokens in (unsafe, safe)]
    assert float((scores[0][:, None] > scores[1][None]).float().mean()) > 0.9
    assert len(made.features) == 6


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
