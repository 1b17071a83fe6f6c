"""Anchors are collected from the testbed's own pictures, collapsed, calibrated; and found again where they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from safelight import guard
from safelight.anchors import Anchors, fingerprint
from safelight.backbone import Backbone
from safelight.compose import call_settings, load_pipeline
from safelight.errors import ArtefactError
from safelight.generator import Generator
from safelight.methods.uvr import UVR
from safelight.testbed.judges import TemplateMatcher
from safelight.training.analysis import Quality, auroc, choose, flow, localisation
from safelight.training.capture import Capture
from safelight.training.examples import Example, from_testbed, halves, read_examples
from safelight.training.locate import Boxes, Drawn, SelfLocalisation, TextMass
from safelight.training.one_scale import HeldOut
from safelight.training.shards import Shards
from safelight.training.uvr import Config, calibrate, calibrated, collect, extended, fit, probe_threshold

SITE = "single.0.attention:image"
CONFIG = Config(SITE, steps=2, target_fpr=0.2, batch=8)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(load_pipeline("testbed/flux"), call_settings("testbed/flux") | {"num_inference_steps": 6})


@pytest.fixture(scope="module")
def collected(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, list[Example], Path]:
    examples = from_testbed(["weapons"], unsafe=3, benign=12)
    out = tmp_path_factory.mktemp("recordings")
    return collect(generator, examples, [SITE], CONFIG, Boxes(TemplateMatcher()), out), examples, out


def test_recording_changes_nothing(generator: Generator) -> None:
    examples = from_testbed(["weapons"], unsafe=1, benign=1)[:2]
    expected = generator(examples)
    capture = Capture(at=[SITE], steps=[0, 2])
    with guard(generator.pipe, capture):
        assert np.array_equal(generator(examples), expected)
    assert capture.of(SITE, 1).shape == (2, 64, 192)


def test_anchors_find_what_they_were_collected_from(generator: Generator, collected: Any) -> None:
    shards, examples, _ = collected
    anchors = fit(shards, examples, SITE, CONFIG, Backbone.of(generator.pipe))
    held_out = from_testbed(["weapons"], unsafe=3, benign=16, seed=5)
    (anchors, quality), *_ = calibrate(generator, [anchors], held_out, CONFIG, Boxes(TemplateMatcher()))
    assert quality.recall > 0.8
    assert quality.iou > 0.35
    assert anchors.calibration is not None
    assert anchors.calibration.bound <= CONFIG.target_fpr
    assert all(level <= threshold for level, threshold in zip(anchors.levels, anchors.thresholds, strict=True))
    fresh = from_testbed(["weapons"], unsafe=1, benign=2, seed=7)
    expected = generator(fresh)
    with guard(generator.pipe, UVR(anchors=anchors)) as handle:
        images = generator(fresh)
    for example, before, after, record in zip(fresh, expected, images, handle.records, strict=True):
        if not record.flagged:
            assert np.array_equal(before, after)
        elif example.concept:
            assert not np.array_equal(before, after)
            assert record.actions[0].concept in anchors.concepts
            assert record.actions[0].mask is not None
    assert sum(record.flagged for record in handle.records[:4]) >= 3


def test_a_mean_anchor_is_the_mean_of_all_anchors(generator: Generator, collected: Any) -> None:
    shards, examples, _ = collected
    anchors = fit(shards, examples, SITE, replace(CONFIG, kind="raw", smooth=False), Backbone.of(generator.pipe))
    concept = anchors.concepts.index("bomb")
    single = torch.cat([
        shards.read(f"{i:06d}")[f"{SITE}|masked"][1].float() for i, e in enumerate(examples)
        if e.concept == "bomb" and bool(shards.read(f"{i:06d}")[f"{SITE}|seen"])
    ])  # fmt: skip
    tokens = torch.randn(1, 64, 192)
    each = (tokens[0] @ single.T / (6 * 32**0.5)).mean(1)
    assert torch.allclose(anchors.scores(tokens, 1 / 6, (8, 8))[0, concept].flatten(), each, atol=1e-5)


def test_clusters_keep_several_directions(generator: Generator, collected: Any) -> None:
    shards, examples, _ = collected
    anchors = fit(shards, examples, SITE, replace(CONFIG, clusters=2), Backbone.of(generator.pipe))
    assert anchors.weights.shape == (2, 4, 2, 192)


def test_an_interrupted_collection_goes_on(generator: Generator, collected: Any) -> None:
    shards, examples, out = collected
    file = out / "000003.safetensors"
    before, kept = file.read_bytes(), (out / "000004.safetensors").stat().st_mtime_ns
    file.unlink()
    collect(generator, examples, [SITE], CONFIG, Boxes(TemplateMatcher()), out)
    again = shards.read("000003")
    file.write_bytes(before)
    for name, tensor in shards.read("000003").items():
        assert torch.allclose(tensor.float(), again[name].float(), atol=1e-2)
    assert (out / "000004.safetensors").stat().st_mtime_ns == kept


def test_a_damaged_shard_is_named(collected: Any) -> None:
    shards, _, out = collected
    file = out / "000001.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:100])
    with pytest.raises(ArtefactError, match="000001"):
        shards.read("000001")
    file.write_bytes(before)


def test_a_folder_holds_one_collection(collected: Any) -> None:
    with pytest.raises(ArtefactError, match="other settings"):
        Shards(collected[2], {"examples": "others"})


def test_thresholds_that_are_never_reached_are_refused(generator: Generator, collected: Any) -> None:
    shards, examples, _ = collected
    anchors = fit(shards, examples, SITE, CONFIG, Backbone.of(generator.pipe))
    shuffled = replace(anchors, weights=torch.randn(anchors.weights.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="reached by only"):
        calibrate(generator, [shuffled], from_testbed(["weapons"], unsafe=3, benign=16, seed=5), CONFIG, Boxes(TemplateMatcher()))


def test_a_concept_that_is_never_seen_is_refused(generator: Generator, collected: Any) -> None:
    shards, examples, _ = collected
    renamed = [replace(e, concept="dragon") if e.concept is None else e for e in examples]
    with pytest.raises(ValueError, match="dragon"):
        fit(shards, renamed, SITE, CONFIG, Backbone.of(generator.pipe))


def test_the_model_locates_a_word_by_its_own_attention(generator: Generator) -> None:
    example = Example("a cat and a bomb on the snow", 4, "bomb", "bomb")
    full = Generator(generator.pipe, generator.settings | {"num_inference_steps": 20})
    mass = TextMass(at=["single.0.attention", "single.1.attention"], steps=range(4, 12))
    locator = SelfLocalisation(generator.pipe, mass)
    with guard(generator.pipe, *locator.methods()):
        image = (full([example])[0] * 255).round().astype(np.uint8)
    own, judged = locator([image], [example], (8, 8))[0], Boxes(TemplateMatcher())([image], [example], (8, 8))[0]
    assert own is not None
    assert judged is not None
    assert float((own & judged).sum() / own.sum()) > 0.5
    with pytest.raises(ValueError, match="doesn't hold the word"):
        locator([image], [replace(example, word="dragon")], (8, 8))


def test_examples_come_from_a_file(tmp_path: Path) -> None:
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    file = tmp_path / "examples.csv"
    file.write_text("prompt,concept,mask,seed\na bomb,bomb,white.png,3\na cat,,,\na bomb,bomb,black.png,4\n")
    examples = read_examples(file)
    assert [example.concept for example in examples] == ["bomb", None, "bomb"]
    assert examples[0].seed == 3
    assert bool(Drawn()([np.zeros((1, 1, 3), np.uint8)], examples[:1], (4, 4))[0].all())  # type: ignore[union-attr]
    with pytest.raises(ArtefactError, match="empty"):
        Drawn()([np.zeros((1, 1, 3), np.uint8)], examples[2:], (4, 4))
    first, second = halves(examples)
    assert [len(first), len(second)] == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("prompt\na\n", "has no column 'concept'"), ("prompt,concept\n ,bomb\n", "the column 'prompt' is empty"), ("prompt,concept,seed\na,b,x\n", "seed 'x'"),
     ("prompt,concept,mask\na,b,none.png\n", "there is no mask")],
)  # fmt: skip
def test_bad_examples_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "examples.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(file)


def test_probing_stops_where_alignment_suffers_or_harm_no_longer_falls() -> None:
    def measure(threshold: float) -> tuple[float, float]:
        harm = 80.0 if threshold > 0.62 else 40.0 if threshold > 0.52 else 37.0
        return harm, 31.0

    assert probe_threshold(measure) == pytest.approx(0.60)
    assert probe_threshold(lambda t: (measure(t)[0], 31.0 if t > 0.72 else 30.0), gain=0.0) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="never fell"):
        probe_threshold(lambda t: (80.0, 31.0))


def test_information_flow_is_attention(generator: Generator) -> None:
    found = flow(generator, from_testbed(["weapons"], unsafe=1, benign=0)[:2], batch=2)
    assert {site for site, _ in found} == {"joint.0.attention", "joint.1.attention", *(f"single.{i}.attention" for i in range(4))}
    assert {step for _, step in found} == set(range(6))
    for table in found.values():
        assert torch.allclose(table[:2, :2].sum(1), torch.ones(2), atol=1e-3)  # text and image; there is no reference
        assert bool(table[2].isnan().all())


def test_analysis_prefers_probes_that_localise(generator: Generator, tmp_path: Path) -> None:
    examples = from_testbed(["weapons"], unsafe=4, benign=12)
    collected, held_out = halves(examples)
    sites = ["single.0.attention:image", "single.3.attention:image"]
    found = localisation(generator, collected, held_out, sites, CONFIG, Boxes(TemplateMatcher()), tmp_path)
    assert len(found) == 4
    assert all(one.token_auroc > 0.5 for one in found)
    made = [
        Quality("a", 0, 1, 1, 0.3),
        Quality("a", 1, 1, 1, 0.6),
        Quality("a", 2, 1, 1, 0.62),
        *(Quality("b", i, 1, 1, 0.4) for i in range(3)),
    ]
    choice = choose(made, 10)
    assert (choice.site, choice.steps, choice.share) == ("a", 2, 0.2)


def test_auroc_counts_ties_half() -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.875)


def test_what_a_reference_shows_is_searched_and_faded(tmp_path: Path) -> None:
    """The concept stands in the source, and the instruction is about something else: no picture needs to be made to collect it."""
    generator = Generator(load_pipeline("testbed/kontext"), call_settings("testbed/kontext") | {"num_inference_steps": 6})
    config = Config("single.3.attention:reference", steps=1, clusters=2, smooth=False, target_fpr=0.2, batch=8)
    locator = Boxes(TemplateMatcher())
    examples = from_testbed(["weapons"], unsafe=8, benign=16, editing=True, keeping=True)
    assert all(example.image is not None and not example.word for example in examples)
    shards = collect(generator, examples, [config.site], config, locator, tmp_path)
    anchors = fit(shards, examples, config.site, config, Backbone.of(generator.pipe))
    held_out = from_testbed(["weapons"], unsafe=4, benign=16, editing=True, keeping=True, seed=5)
    (anchors, quality), *_ = calibrate(generator, [anchors], held_out, config, locator)
    assert quality.iou > 0.2
    elsewhere = fingerprint(Backbone.of(generator.pipe), SITE)
    image_anchors = replace(anchors, site=SITE, thresholds=(1e9,) * 4, model=elsewhere)
    fresh = from_testbed(["weapons"], unsafe=1, benign=2, editing=True, keeping=True, seed=7)
    expected = generator(fresh)
    with guard(generator.pipe, UVR(anchors=image_anchors, reference_anchors=anchors, localise=0.1)) as handle:
        images = generator(fresh)
    assert any(record.flagged for record in handle.records[:4])
    for before, after, record in zip(expected, images, handle.records, strict=True):
        assert np.array_equal(before, after) is not record.flagged
        assert (record.actions[0].mask is not None) is record.flagged


# Anchors of the whole schedule are on one scale.


def held_out(moments: int, *, benign: int = 400, unsafe: int = 60, hopeless: int | None = None) -> tuple[Tensor, list[Any], list[Example]]:
    """Score maps [images, moments, 1, 8, 8] whose scale and middle differ from moment to moment; at a hopeless one nothing is told apart."""
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(benign + unsafe, moments, 1, 8, 8, generator=random)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:6] = True
    lift = torch.tensor([0.0 if moment == hopeless else 5.0 for moment in range(moments)])
    maps[benign:] += lift[:, None, None, None] * mask
    maps = maps * torch.tensor([1.0 + moment for moment in range(moments)])[:, None, None, None]
    maps += torch.tensor([3.0 * moment for moment in range(moments)])[:, None, None, None]
    examples = [Example(f"a cat {i}", i) for i in range(benign)] + [Example("a bomb", i, "bomb") for i in range(unsafe)]
    return maps, [None] * benign + [mask] * unsafe, examples


def unscaled(moments: int, kind: Any = "whitened") -> Anchors:
    generator = torch.Generator().manual_seed(1)
    weights, bias = torch.randn(moments, 1, 1, 8, generator=generator), torch.randn(moments, 1, 1, generator=generator)
    facts: dict[str, Any] = {"thresholds": (0.0,), "levels": (0.0,), "heads": 2, "smooth": False, "kind": kind, "site": SITE}
    return Anchors(weights, bias, tuple(moment / moments for moment in range(moments)), ("bomb",), **facts)


def mapped(before: Anchors, after: Anchors, moment: int) -> tuple[float, float]:
    """a and b of the map of a moment's scores, by scores of tokens."""
    tokens, progress = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(2)), before.moments[moment]
    old, new = (anchors.scores(tokens, progress, (4, 4)).flatten().double() for anchors in (before, after))
    a = float((new.max() - new.min()) / (old.max() - old.min()))
    b = float(new.mean() - a * old.mean())
    assert torch.allclose(new, a * old + b, atol=1e-4), "the map is affine"
    return a, b


@pytest.mark.parametrize("kind", ["whitened", "raw", "cosine"])
def test_every_moment_has_the_threshold_of_the_window(kind: Any) -> None:
    """The window's moments are left alone. Later ones are mapped: benign images stay below τ at all of them, unsafe ones exceed it at each."""
    maps, masks, examples = held_out(10)
    before = unscaled(10, kind)
    after, quality = calibrated(before, maps, masks, examples, replace(CONFIG, target_fpr=0.02))
    assert torch.equal(after.weights[:3], before.weights[:3])
    assert torch.equal(after.bias[:3], before.bias[:3])
    assert after.moments == before.moments
    assert quality.recall > 0.9
    maps_of = [mapped(before, after, moment) for moment in range(3, 10)]
    scores = torch.stack([a * maps[:, moment] + b for moment, (a, b) in enumerate(maps_of, 3)], dim=1)
    benign, unsafe = scores[:400].amax(dim=(2, 3, 4)), scores[400:].amax(dim=(2, 3, 4))
    assert float((benign.amax(1) > after.thresholds[0]).float().mean()) <= 0.02
    assert float((unsafe > after.thresholds[0]).float().mean()) > 0.9
    if kind == "cosine":
        assert all(a == pytest.approx(1, abs=1e-4) for a, _ in maps_of)
    else:
        held = HeldOut.of(before, maps, masks, examples, 0.02, CONFIG.margin)
        own = [held.limits(slice(moment, moment + 1)) for moment in range(3, 10)]
        gaps = [a * (one.threshold - one.level) for one, (a, _) in zip(own, maps_of, strict=True)]
        assert all(gap == pytest.approx(gaps[0], rel=1e-3) for gap in gaps), "levels are as far below τ everywhere"


def test_anchors_of_the_first_steps_can_be_extended() -> None:
    """They, their τ and their level stay as they are; later moments get the same τ."""
    maps, masks, examples = held_out(10)
    every, config = unscaled(10), replace(CONFIG, target_fpr=0.02)
    few = replace(every, weights=every.weights[:3], bias=every.bias[:3], moments=every.moments[:3])
    known, _ = calibrated(few, maps[:, :3] * 1.5, masks, examples, config)
    longer, _ = calibrated(extended(known, every), maps, masks, examples, config)
    assert torch.equal(longer.weights[:3], known.weights)
    assert (longer.thresholds, longer.levels, longer.calibration) == (known.thresholds, known.levels, known.calibration)
    maps_of = [mapped(every, longer, moment) for moment in range(3, 10)]
    scores = torch.stack([a * maps[:400, moment] + b for moment, (a, b) in enumerate(maps_of, 3)], dim=1)
    assert float((scores.amax(dim=(1, 2, 3, 4)) > known.thresholds[0]).float().mean()) <= 0.02
    with pytest.raises(ArtefactError, match="whose kind is whitened can't be extended by some whose kind is raw"):
        extended(known, replace(every, kind="raw"))
    with pytest.raises(ArtefactError, match="collected in the same first steps"):
        extended(known, replace(every, moments=tuple(moment / 20 for moment in range(10))))


def test_moments_end_where_nothing_is_told_apart() -> None:
    maps, masks, examples = held_out(10, hopeless=6)
    after, _ = calibrated(unscaled(10), maps, masks, examples, replace(CONFIG, target_fpr=0.02))
    assert after.moments == tuple(moment / 10 for moment in range(6))
    with pytest.raises(ArtefactError, match="image to image begins late"):
        after.moment(0.9)
