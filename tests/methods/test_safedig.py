"""SafeDIG on every diffusion transformer: dictionaries are recorded, trained and adapted on each, as the command does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline

from safelight import guard
from safelight.backbone import Backbone
from safelight.bank import Pair
from safelight.bundle import load, save
from safelight.dictionary import Dictionary
from safelight.errors import ArtefactError, SafetyBypassed
from safelight.generator import Generator
from safelight.methods.safedig import SafeDIG
from safelight.nets.sae import SAE, Decoder
from safelight.testing import check_method, sample, tiny_pipeline
from safelight.testing.methods import SAFE, UNSAFE
from safelight.training.domains import Domains
from safelight.training.harm import peaks
from safelight.training.sae_learning import SAEConfig
from safelight.training.safedig import Config, Recorded, assemble, gather, train_sae
from safelight.training.transfer import TransferConfig

KINDS = ("sd3", "flux", "kontext")
SITES = {"sd3": ("prompt:text", "joint.0:image"), "flux": ("prompt:text", "joint.0:image"), "kontext": ("prompt:text", "joint.0:image")}
STEPS = 3


def pairs_of(word: str, twin: str) -> list[Pair]:
    places = ("on a beach", "at night", "on the snow", "on the sea", "on the meadow", "in the desert")
    texts = [f"a {{}} {place}" for place in places] + [f"a big {{}} {place}" for place in places]
    return [Pair(text.format(word), text.format(twin), word) for text in texts]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], tuple[Dictionary, ...]]:
    """Dictionaries of a tiny pipeline, made once for each kind; the one of the prompt is the gate."""
    known: dict[str, tuple[Dictionary, ...]] = {}

    def fit(pipe: Any) -> tuple[Dictionary, ...]:
        kind = type(pipe).__name__
        if kind not in known:
            name = next(name for name in KINDS if type(tiny_pipeline(name)) is type(pipe))
            known[kind] = _made(name, tmp_path_factory.mktemp(name))
        return known[kind]

    return fit


def _made(name: str, out: Path) -> tuple[Dictionary, ...]:
    pipe = tiny_pipeline(name)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "height": 24, "width": 24}
    if name == "kontext":
        settings |= {"max_area": 24 * 24, "_auto_resize": False}
    domains = Domains(pairs_of("knife", "cat"), pairs_of("beer", "dog")[:4], [*SAFE, "a tree on the sea"], ("weapons", "substances"))
    sae = SAEConfig(expansion=2, k=6, lr=3e-3, batch=64, epochs=30)
    config = Config(fixed=SITES[name], times=STEPS, sae=sae, text_k=6, harmful=8, transfer=TransferConfig(closeness=1e-4))
    recorded = gather(Generator(pipe, settings), domains, config, out)
    found = []
    for site in SITES[name]:
        dictionary = assemble(recorded, site, "blend", train_sae(recorded, site, config, out)[0], Backbone.of(pipe), config, STEPS)
        found.append(replace(dictionary, threshold=_between(recorded, dictionary) if site == "prompt:text" else None))
    return tuple(found)


def _between(recorded: Recorded, dictionary: Dictionary) -> float:
    unsafe, safe = (
        peaks(dictionary.sae, dictionary.alarm, tokens, range(STEPS)) for tokens in recorded.pairs(dictionary.site, target=False)
    )
    assert float(unsafe.min()) > float(safe.max()), "the dictionary tells knives from cats"
    return float(unsafe.min() + safe.max()) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["blend", "repel"])
def test_the_method_keeps_its_promises(kind: str, operator: Any, fitted: Any) -> None:
    pipe = tiny_pipeline(kind)
    check_method(lambda pipe: SafeDIG(dictionaries=fitted(pipe), operator=operator, watch=1.0), [pipe])


@pytest.mark.parametrize("kind", KINDS)
def test_without_strength_nothing_changes(kind: str, fitted: Any) -> None:
    pipe = tiny_pipeline(kind)
    expected = sample(pipe, [*UNSAFE])
    for gated in (True, False):
        with guard(pipe, SafeDIG(dictionaries=fitted(pipe), beta=0.0, gamma=0.0, gated=gated)):
            assert torch.equal(sample(pipe, [*UNSAFE]), expected)


def test_an_empty_window_is_told_where_there_is_something_to_do(flux: Any, fitted: Any) -> None:
    with (
        guard(flux, SafeDIG(dictionaries=fitted(flux), after=0.5, until=0.5)),
        pytest.raises(SafetyBypassed, match="did nothing about image 0"),
    ):
        sample(flux, UNSAFE[0])


def test_steering_begins_with_its_window(flux: Any, fitted: Any) -> None:
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"].clone())
        return given

    sample(flux, UNSAFE[0], callback_on_step_end=keep)
    with guard(flux, SafeDIG(dictionaries=fitted(flux), after=1 / 3)) as handle:
        sample(flux, UNSAFE[0], callback_on_step_end=keep)
    assert torch.equal(seen[0], seen[STEPS]), "the first step lies before the window"
    assert not torch.equal(seen[-1], seen[STEPS - 1])
    assert handle.records[0].actions[0].steps == (1, STEPS)


def test_repel_leaves_tokens_without_harmful_features_alone(flux: Any, fitted: Any) -> None:
    dictionary = fitted(flux)[0]
    quiet = replace(dictionary, harmful=replace(dictionary.harmful, means=dictionary.harmful.means + 1e6))
    tokens = torch.randn(2, 7, dictionary.sae.token_width)
    method = SafeDIG(dictionaries=(quiet,), operator="repel")
    method.run = type("Now", (), {"progress": 0.0})()  # type: ignore[assignment]
    assert torch.equal(method._steered(quiet, tokens), tokens)
    loud = replace(dictionary, harmful=replace(dictionary.harmful, means=dictionary.harmful.means * 0 - 1))
    assert not torch.equal(method._steered(loud, tokens), tokens)


def test_features_count_up_to_nine_deviations(flux: Any, fitted: Any) -> None:
    dictionary = fitted(flux)[0]
    huge = 1e4 * torch.randn(1, 3, dictionary.sae.token_width, generator=torch.Generator().manual_seed(0))
    harm = dictionary.harm(dictionary.sae.inward(huge), 0)
    limit = dictionary.harmful.means[0] + 9 * dictionary.harmful.spreads[0]
    assert bool((harm <= limit + 1e-5).all())
    assert bool((harm > 0).any())


def test_a_record_names_the_features_that_fired(flux: Any, fitted: Any) -> None:
    with guard(flux, SafeDIG(dictionaries=fitted(flux))) as handle:
        sample(flux, [SAFE[0], UNSAFE[0]])
    harmless, steered = (record.actions[0] for record in handle.records)
    assert not harmless.flagged
    assert harmless.score is not None
    assert harmless.threshold is not None
    assert harmless.score < harmless.threshold
    assert steered.flagged
    assert steered.concept == "weapons, substances"
    assert steered.action == "blended"
    assert steered.note is not None
    assert steered.note.startswith("features ")
    assert handle.run is not None
    events = [event for event in handle.run.events if event["event"] == "features"]
    assert [event["image"] for event in events] == [1]
    assert set(events[0]["features"]) <= set(fitted(flux)[0].harmful.features.flatten().tolist())
    json.dumps(handle.records[1].to_json())


def test_near_published_operators_change_every_picture(flux: Any, fitted: Any) -> None:
    expected = sample(flux, [SAFE[0], UNSAFE[0]])
    for operator in ("blend", "repel"):
        with guard(flux, replace(SafeDIG.near_published(fitted(flux)), operator=operator)):
            images = sample(flux, [SAFE[0], UNSAFE[0]])
        assert not torch.equal(images[0], expected[0])
        assert not torch.equal(images[1], expected[1])


def test_near_published_formulas(flux: Any, fitted: Any) -> None:
    dictionary = fitted(flux)[1]
    method = SafeDIG.near_published([dictionary], beta=0.3, gamma=0.1)
    method.run = type("Now", (), {"progress": 0.0})()  # type: ignore[assignment]
    a = torch.randn(2, 5, dictionary.sae.token_width, generator=torch.Generator().manual_seed(0))
    sae, moment = dictionary.sae, dictionary.moment(0.0)
    z = sae.features(a / sae.scale).values
    blended = 0.7 * a + 0.3 * sae.scale * dictionary.adapted(z)
    torch.testing.assert_close(replace_run(method, "blend")._steered(dictionary, a), blended, atol=1e-4, rtol=1e-4)
    chosen = dictionary.harmful.features[moment]
    masked = torch.zeros_like(z).index_copy(-1, chosen, dictionary.harm(a / sae.scale, moment))
    repelled = a - 0.1 * (sae.scale * dictionary.adapted(masked) - a)
    torch.testing.assert_close(replace_run(method, "repel")._steered(dictionary, a), repelled, atol=1e-4, rtol=1e-4)


def replace_run(method: SafeDIG, operator: Any) -> SafeDIG:
    changed = replace(method, operator=operator)
    changed.run = method.run
    return changed


def test_a_dictionary_survives_its_file(flux: Any, fitted: Any, tmp_path: Path) -> None:
    for dictionary in fitted(flux):
        dictionary.save(tmp_path / "one.safetensors")
        again = Dictionary.load(tmp_path / "one.safetensors")
        for own, other in ((dictionary.sae, again.sae), (dictionary.adapted, again.adapted)):
            for name, value in own.state_dict().items():
                assert value is None or torch.equal(value, other.state_dict()[name]), name
        assert torch.equal(dictionary.harmful.features, again.harmful.features)
        assert (dictionary.site, dictionary.operator, dictionary.threshold) == (again.site, again.operator, again.threshold)
        assert dictionary.moments == again.moments


def test_a_bundle_gives_the_same_pictures(flux: Any, fitted: Any, tmp_path: Path) -> None:
    method = SafeDIG(dictionaries=fitted(flux), beta=0.7)
    with guard(flux, method):
        expected = sample(flux, UNSAFE[0])
    save(tmp_path, method, made_for="tiny")
    with guard(flux, *load(tmp_path, made_for="tiny")):
        assert torch.equal(sample(flux, UNSAFE[0]), expected)
    assert not [file for file in tmp_path.iterdir() if file.suffix not in (".json", ".safetensors")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], "has no dictionary"),
        (lambda d: [d[0], d[0]], "two dictionaries of one site"),
        (lambda d: [d[1]], "none of safedig's dictionaries has a threshold"),
        (lambda d: [replace(d[0], site="joint.9:image")], r"no site 'joint\.9:image'"),
        (lambda d: [replace(d[0], model={**d[0].model, "denoiser": "Another"})], "denoiser is Another"),
        (lambda d: [replace(d[0], model={**d[0].model, "weights": [1.0] * 64})], "another checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(change: Any, message: str, flux: Any, fitted: Any) -> None:
    with pytest.raises(ArtefactError, match=message):
        guard(flux, SafeDIG(dictionaries=tuple(change(fitted(flux)))))


def test_a_dictionary_of_another_site_or_width_is_refused(flux: Any, fitted: Any) -> None:
    text = fitted(flux)[0]
    narrow = replace(text, sae=SAE(4, 16, 2).requires_grad_(False), adapted=Decoder(16, 4))
    with pytest.raises(ArtefactError, match="takes width 4, but 'prompt:text' has"), guard(flux, SafeDIG(dictionaries=(narrow,))):
        sample(flux, UNSAFE[0])


def test_a_unet_is_refused(sd: Any, fitted: Any) -> None:
    with pytest.raises(ArtefactError, match=r"no site 'joint\.0:image'"):
        guard(sd, SafeDIG(dictionaries=(replace(fitted(tiny_pipeline("flux"))[1], threshold=0.1),)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda facts, tensors: facts.pop("site"), "lacks a part"),
        (lambda facts, tensors: facts.update(operator="push"), "unknown operator 'push'"),
        (lambda facts, tensors: tensors.pop("adapted.weight"), "lacks a part"),
        (lambda facts, tensors: tensors["sae.b_pre"].fill_(torch.nan), "NaN or infinite"),
        (lambda facts, tensors: tensors["harmful.features"].fill_(10_000), "features beyond its"),
        (lambda facts, tensors: tensors["alarm.features"].fill_(-1), "features beyond its"),
        (lambda facts, tensors: tensors.update({"alarm.weights": torch.zeros(1)}), "no weight for each feature of its alarm"),
        (lambda facts, tensors: facts.update(moments=[0.0]), "no harmful features for each time point"),
    ],
)
def test_damaged_files_are_named(spoil: Any, message: str, flux: Any, fitted: Any, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "one.safetensors"
    fitted(flux)[0].save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["facts"])
    spoil(facts, tensors)
    save_file(tensors, path, metadata | {"facts": json.dumps(facts)})
    with pytest.raises(ArtefactError, match=message):
        Dictionary.load(path)


def test_other_files_are_no_dictionaries(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="can't be read as a safety dictionary"):
        Dictionary.load(tmp_path / "one.safetensors")


def test_a_gate_on_image_tokens_is_refused_where_a_generation_begins_late(flux: Any, fitted: Any) -> None:
    """It knows the first steps from noise; what the prompt says is the same at every noise level."""
    by_prompt, by_image = fitted(flux)
    pipe = FluxImg2ImgPipeline(**flux.components)
    pipe.set_progress_bar_config(disable=True)
    late = {"image": torch.full((1, 3, 24, 24), 0.5), "steps": 4, "height": 24, "width": 24}

    def flagged(strength: float, *dictionaries: Dictionary) -> bool:
        with guard(pipe, SafeDIG(dictionaries=dictionaries), unjudged_images="accept") as handle:
            sample(pipe, UNSAFE[0], strength=strength, **late)
        return handle.records[0].flagged

    assert flagged(0.5, by_prompt, by_image)
    looking = replace(by_image, threshold=-1e9)
    assert flagged(1.0, looking)
    with pytest.raises(ArtefactError, match=r"joint.0:image.*began at 50% of the noise schedule.*prompt:text"):
        flagged(0.5, looking)
