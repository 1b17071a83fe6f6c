"""UVR finds what its anchors describe, and regulates it there and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from torch import Tensor
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention

from safelight import Method, guard
from safelight.anchors import Anchors, fingerprint
from safelight.attach import Guard
from safelight.backbone import Backbone
from safelight.compose import build, call_settings, load_pipeline
from safelight.errors import ArtefactError, SafetyBypassed, UnsupportedPipeline
from safelight.evaluation.case import Case
from safelight.flow import Call, Heads, Step
from safelight.generator import Generator
from safelight.masks import clean, dilate
from safelight.methods.gate import Gate
from safelight.methods.uvr import UVR
from safelight.record import Action
from safelight.run import Run
from safelight.site import Site
from safelight.testbed.judges import Classifier
from safelight.testbed.scenes import Scene, render
from safelight.testing import Containing, sample, tiny_pipeline
from safelight.testing import methods as promises
from safelight.testing.methods import SAFE, UNSAFE

PROBES = {"flux": "single.0.attention:image", "kontext": "single.0.attention:image", "sd3": "joint.1.attention:image"}
BATCH = [SAFE[0], UNSAFE[0], SAFE[1], UNSAFE[1]]
NEVER = 1e9
IMAGE_TO_IMAGE: dict[str, Any] = {"flux": FluxImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline}

every_pipeline = pytest.mark.parametrize("name", PROBES)
generators = pytest.mark.parametrize("name", ["flux", "sd3"])


class Witness(Method):
    """Sees what passes at its place in the chain."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.tokens: list[Tensor] = []
        self.attended: list[tuple[Heads, Tensor]] = []
        self.predicted: list[Tensor] = []
        self.noise: list[Tensor] = []

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        return self.addresses

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        self.tokens.append(tokens)
        return tokens

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        self.attended.append((heads, attend(heads)))
        return self.attended[-1][1]

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        self.predicted.append(denoise(call))
        return self.predicted[-1]

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        self.noise.append(step.noise)
        return advance(step)


@functools.cache
def learnt(name: str) -> dict[str, Any]:
    """Directions under which each unsafe prompt has first-step tokens above 1, and no harmless prompt any above 0.5."""
    pipe, rows = tiny_pipeline(name), []
    for prompt in (*SAFE, *UNSAFE):
        witness = Witness(PROBES[name])
        with guard(pipe, witness):
            sample(pipe, [prompt] * 5, steps=1, guided=False)
        maps = witness.tokens[0].transpose(1, 2).unflatten(-1, (6, 6))
        smooth = avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
        rows.append(smooth.flatten(2).transpose(1, 2).flatten(0, 1).double())
    tokens = torch.cat(rows)
    inputs = torch.cat([tokens, torch.ones(len(tokens), 1)], 1)
    wanted = torch.cat([-torch.ones(len(tokens) // 2), torch.ones(len(tokens) // 2)]).double()
    ridge = 1e-5 * len(tokens) * tokens.var() * torch.eye(inputs.shape[1])
    solved = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted).float().view(1, 1, 1, -1)
    model = fingerprint(Backbone.of(pipe), PROBES[name])
    return {"weights": solved[..., :-1].contiguous(), "bias": solved[..., -1], "site": PROBES[name], "model": model}


def anchors(name: str, threshold: float = 1.0, **changes: Any) -> Anchors:
    moments = (0.0, 0.25, 0.5, 0.75)  # the same everywhere
    facts = {"moments": moments, "concepts": ("weapon",), "thresholds": (threshold,), "levels": (threshold,), "heads": 2}
    everywhere = {part: learnt(name)[part].expand(len(moments), *learnt(name)[part].shape[1:]) for part in ("weights", "bias")}
    return Anchors(**facts | learnt(name) | everywhere | changes)


def uvr(name: str, threshold: float = 1.0, **fields: Any) -> UVR:
    return UVR(anchors=anchors(name, threshold), **fields)


def masks_of(handle: Guard) -> list[Tensor | None]:
    """The mask in each image's record."""
    found = [record.actions[0].mask for record in handle.records]
    return [None if mask is None else torch.tensor(mask, dtype=torch.bool) for mask in found]


def mask_of(handle: Guard, image: int = 0) -> Tensor:
    mask = masks_of(handle)[image]
    assert mask is not None
    assert 0 < mask.sum() < mask.numel(), "the test needs a mask that is neither empty nor all"
    return mask


VARIANTS: dict[str, dict[str, Any]] = {
    "flux, text": {"localise": 0},
    "sd3, text": {"localise": 0},
    "kontext, V scaled": {"renormalise": False, "reference": 0.2, "reference_ring": 0.4, "boost": 1.05, "ring": 1},
    "flux, noise": {"text": 1, "noise": 0.9, "until": 0.5},
    "sd3, noise": {"text": 1, "noise": 0.9, "noise_like": "unit", "guidance": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_keeps_the_promises_of_a_method(variant: str) -> None:
    """Rows are independent and masks too, unflagged rows bit-identical, nothing is left behind or remembered, and it can be stacked."""
    name = variant.split(",")[0]
    pipe, factory = tiny_pipeline(name), lambda pipe: uvr(name, **VARIANTS[variant])
    promises.check_rows(factory, pipe, guided="noise" not in variant)
    if "noise" not in variant:
        promises.check_idle(factory, pipe, guided=False)
        promises.check_memory(factory, pipe, guided=False)
    elif variant == "sd3, noise":
        promises.check_memory(factory, pipe)
        promises.check_detachment(factory, pipe)
        promises.check_stacking(factory, pipe)


@every_pipeline
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_an_empty_mask_changes_nothing(name: str, guided: bool) -> None:
    pipe = tiny_pipeline(name)
    everything = uvr(name, NEVER, noise=0.9, boost=1.05, ring=2, guidance=-1.0, localise=1.0)
    expected = sample(pipe, BATCH, guided=guided)
    for method in (everything, UVR.near_published(anchors(name, NEVER), editing=name == "kontext")):
        with guard(pipe, method) as handle:
            assert torch.equal(sample(pipe, BATCH, guided=guided), expected)
        assert not any(record.flagged for record in handle.records)
        assert masks_of(handle) == [None] * 4


@every_pipeline
def test_strength_0_changes_nothing(name: str) -> None:
    pipe = tiny_pipeline(name)
    expected = sample(pipe, BATCH)
    idle: dict[str, Any] = {"text": 1, "reference": 1, "reference_ring": 1, "guidance": None}
    for fields, found in ((idle, True), (idle | {"renormalise": False}, True), ({"until": 0}, False)):
        with guard(pipe, uvr(name, **fields)) as handle:
            assert torch.equal(sample(pipe, BATCH), expected)
        assert [record.flagged for record in handle.records] == [False, found, False, found]


@every_pipeline
def test_masks_are_independent_of_the_batch(name: str) -> None:
    """Scores differ by rounding between batch sizes, masks only if one lies exactly at the threshold."""
    pipe = tiny_pipeline(name)
    with guard(pipe, UVR(anchors=anchors(name, NEVER), threshold=1.0)) as handle:
        sample(pipe, BATCH)
        together = masks_of(handle)
        for image, prompt in enumerate(BATCH):
            sample(pipe, prompt, seeds=[image])
            assert str(masks_of(handle)[0]) == str(together[image])
    assert [mask is None for mask in together] == [True, False, True, False]
    assert not torch.equal(together[1], together[3])


@every_pipeline
@pytest.mark.parametrize("renormalise", [True, False], ids=["log λ", "V scaled"])
def test_attention_is_that_of_the_formula(name: str, renormalise: bool) -> None:
    """λ(i, j) with an attention matrix, at the last block, for one sample with a mask and one without."""
    pipe = tiny_pipeline(name)
    site = "joint.2.attention" if name == "sd3" else "single.1.attention"
    witness = Witness(site)
    fields: dict[str, Any] = {"text": 0.3, "reference": 0.2, "reference_ring": 0.4, "boost": 1.05, "ring": 1}
    with guard(pipe, witness, uvr(name, renormalise=renormalise, **fields)) as handle:
        sample(pipe, [UNSAFE[0], SAFE[0]], seeds=[1, 0])
    core = mask_of(handle)
    whole = dilate(core[None])[0]
    for heads, result in witness.attended:
        factors = torch.ones(2, heads.query.shape[2], heads.key.shape[2])
        text, image = heads.keys["text"], heads.keys["image"]
        if name == "kontext":
            faded = torch.where(core, 0.2, torch.where(whole, 0.4, 1.0)).flatten()
            for stream in ("text", "image"):
                factors[0, heads.queries[stream], heads.keys["reference"]] = faded
            factors[0, image, text] = factors[0, image, image] = 1.05
        rows = torch.arange(heads.query.shape[2])[image][whole.flatten()]
        factors[0, rows, text] *= 0.3
        probabilities = (heads.query @ heads.key.transpose(-1, -2) / heads.query.shape[-1] ** 0.5).softmax(-1) * factors[:, None]
        if renormalise:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        assert torch.allclose(result, probabilities @ heads.value, atol=1e-5)
    assert len(witness.attended) == 3


@generators
@pytest.mark.parametrize("like", ["unit", "outputs"])
def test_masked_outputs_become_noise(name: str, like: Any) -> None:
    """(1 - a) out + a ε at the probe, where the first noise of a generation is drawn."""
    pipe, pairs = tiny_pipeline(name), []
    for share in (1.0, 0.5):
        before, after = Witness(PROBES[name]), Witness(PROBES[name])
        with guard(pipe, before, uvr(name, 0.9, noise=share, noise_like=like, text=1), after) as handle:
            sample(pipe, UNSAFE[1])
        pairs.append((before.tokens[0][0], after.tokens[0][0]))
    mask = mask_of(handle).flatten()
    (out, noise), (_, half) = pairs
    assert torch.equal(noise[~mask], out[~mask])
    assert torch.equal(half[~mask], out[~mask])
    assert torch.allclose(half[mask], (out[mask] + noise[mask]) / 2, atol=1e-6)
    for head in range(2):
        drawn, rest = (tokens.unflatten(-1, (2, -1))[:, head] for tokens in (noise[mask], out[~mask]))
        mean, spread = (0.0, 1.0) if like == "unit" else (float(rest.mean()), float(rest.std(correction=0)))
        assert float((drawn.mean() - mean) / spread) == pytest.approx(0, abs=4 / drawn.numel() ** 0.5)
        assert float(drawn.std() / spread) == pytest.approx(1, abs=4 / (2 * drawn.numel()) ** 0.5)


@generators
def test_noise_belongs_to_the_sample_and_not_to_its_place(name: str) -> None:
    pipe = tiny_pipeline(name)
    found: dict[tuple[int, ...], tuple[Tensor, Tensor, list[Any]]] = {}
    for seeds in ((1, 2, 3), (3, 1), (2,)):
        after = Witness(PROBES[name])
        with guard(pipe, uvr(name, noise=1.0, noise_like="unit", text=1, memory="first"), after) as handle:
            images = sample(pipe, [UNSAFE[0]] * len(seeds), seeds=seeds)
        found[seeds] = images, after.tokens[0], masks_of(handle)
    images, tokens, masks = found[1, 2, 3]
    for seeds in ((3, 1), (2,)):
        for row, seed in enumerate(seeds):
            mask = masks[seed - 1].flatten()
            assert torch.equal(found[seeds][1][row, mask], tokens[seed - 1, mask])
            assert torch.allclose(found[seeds][0][row], images[seed - 1], atol=1e-4)  # rounding differs between batch sizes
    both = (masks[0] & masks[1]).flatten()
    assert both.any()
    assert not torch.isclose(tokens[0, both], tokens[1, both]).any(), "each sample has noise of its own"


@every_pipeline
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_masked_tokens_have_a_guidance_scale_of_their_own(name: str, scale: float) -> None:
    pipe, witness = tiny_pipeline(name), Witness()
    with guard(pipe, uvr(name, guidance=scale), witness) as handle:
        sample(pipe, [SAFE[0], UNSAFE[0]])
    mask = mask_of(handle, 1)
    predicted = iter(witness.predicted)  # by one batched call in each step, or first with the prompt and then without
    for noise in witness.noise:
        cond, uncond = reversed(next(predicted).chunk(2)) if name == "sd3" else (next(predicted), next(predicted))
        scales = torch.ones(noise.shape) * (3.0 if name == "sd3" else 2.0)
        if name == "sd3":
            scales[1][:, torch.from_numpy(np.kron(mask, np.ones((2, 2), bool)))] = scale
        else:
            scales[1][mask.flatten()] = scale
        assert torch.allclose(noise, uncond + scales * (cond - uncond), atol=1e-5)


@pytest.mark.parametrize(("total", "acting"), [(28, 11), (50, 18), (20, 8)])
def test_the_window_of_noise_levels(total: int, acting: int) -> None:
    """σ ≥ 0.85 of FLUX's schedule at 1024², where μ = 1.15."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / total, total), mu=1.15)
    pipe: Any = SimpleNamespace(scheduler=scheduler, num_timesteps=total)
    method = UVR.near_published(anchors("flux"))
    method.run = Run(SimpleNamespace(pipe=pipe), lambda: None, None)  # type: ignore[arg-type]
    method.begin()
    windows = []
    for index in range(total):
        method.run.index = index
        assert method.run.sigmas[index] == float(scheduler.sigmas[index])
        windows.append(method.acting)
    assert windows == [True] * acting + [False] * (total - acting)


@pytest.mark.parametrize(("fields", "acting"), [({"sigma": 0.85}, 8), ({"until": 0.25}, 5), ({"until": 0.0}, 0), ({}, 20)])
def test_attention_is_regulated_in_the_window_only(fields: dict[str, Any], acting: int, flux: Any) -> None:
    """With the whole pipeline, whose schedule is shifted as at 1024²."""
    flux.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=1.15, max_shift=1.15)
    witness = Witness("single.1.attention")
    with guard(flux, witness, uvr("flux", **fields)) as handle:
        sample(flux, UNSAFE[0], steps=20, guided=False)
    changed = [not torch.equal(scaled_dot_product_attention(h.query, h.key, h.value), result) for h, result in witness.attended]
    assert changed == [True] * acting + [False] * (20 - acting)
    if acting and "sigma" not in fields:
        assert handle.records[0].actions[0].steps == (0, acting)


def test_the_record_says_when_a_window_of_noise_levels_ends(flux: Any) -> None:
    with guard(flux, uvr("flux", sigma=0.5)) as handle:
        sample(flux, UNSAFE[0], steps=4)
    assert handle.records[0].actions[0].steps == (0, 3)


@pytest.mark.parametrize("memory", ["union", "first", "latest"])
def test_earlier_masks_are_joined_kept_or_replaced(memory: Any) -> None:
    pipe, witness, own = tiny_pipeline("kontext"), Witness(PROBES["kontext"]), anchors("kontext", 1.1)
    with guard(pipe, witness, UVR(anchors=own, memory=memory, localise=0.75)) as handle:
        sample(pipe, UNSAFE[1], steps=4, guided=False)
    maps = [own.scores(tokens, 0.0, (6, 6))[:, 0] for tokens in witness.tokens[:3]]
    found = [clean(scores > 1.1, torch.ones_like(scores))[0] for scores in maps]
    expected = {"union": found[0] | found[1] | found[2], "first": found[0], "latest": found[2]}
    assert not torch.equal(found[0], found[2])
    assert torch.equal(mask_of(handle), expected[memory])


@every_pipeline
def test_every_resolution_and_text_length(name: str) -> None:
    pipe = tiny_pipeline(name)
    for height, width, length in ((16, 32, 4), (40, 24, 12), (8, 36, 24), (4, 4, 6), (4, 20, 9)):
        size: dict[str, Any] = {"height": height, "width": width, "max_sequence_length": length, "guided": name == "sd3"}
        size |= {"max_area": height * width} if name == "kontext" else {}
        expected = sample(pipe, UNSAFE[0], **size)
        with guard(pipe, uvr(name, NEVER)):
            assert torch.equal(sample(pipe, UNSAFE[0], **size), expected)
        with guard(pipe, uvr(name, -NEVER, noise=0.5, reference=0.2, ring=1)) as handle:
            images = sample(pipe, UNSAFE[0], **size)
        assert np.shape(handle.records[0].actions[0].mask) == tuple(side // 4 for side in expected.shape[-2:])
        assert images.shape == expected.shape
        assert torch.isfinite(images).all()
        assert not torch.equal(images, expected)


def test_small_and_superfluous_components_are_dropped(flux: Any) -> None:
    sizes = []
    for fields in ({}, {"components": 1}, {"cover": 0.01}):
        with guard(flux, uvr("flux", 1.05, **fields)) as handle:
            sample(flux, UNSAFE[0], steps=1, guided=False)
        sizes.append(sum(map(sum, handle.records[0].actions[0].mask or [])))
    assert sizes[0] > sizes[1] == sizes[2] > 0
    with guard(flux, uvr("flux", 1.05, least=1.0)), pytest.raises(SafetyBypassed, match=r"did nothing about image 0 \(no component"):
        sample(flux, UNSAFE[0], steps=1, guided=False)


def test_unets_are_refused(sd: Any) -> None:
    with pytest.raises(UnsupportedPipeline, match="text and image tokens, and UNet2DConditionModel has none; use dual_latent"):
        guard(sd, uvr("flux"))


@generators
def test_fused_projections_keep_working(name: str) -> None:
    pipe, method = tiny_pipeline(name), uvr(name)
    with guard(pipe, method):
        expected = sample(pipe, UNSAFE[0])
    pipe.transformer.fuse_qkv_projections()
    with guard(pipe, method):
        assert torch.allclose(sample(pipe, UNSAFE[0]), expected, atol=1e-4)


@every_pipeline
def test_the_record_says_what_was_found_and_done(name: str) -> None:
    pipe = tiny_pipeline(name)
    with guard(pipe, uvr(name, text=0.25)) as handle:
        sample(pipe, [SAFE[0], UNSAFE[0]], steps=4)
    harmless, found = (record.actions[0] for record in handle.records)
    assert (harmless.score or 0) < 1.0 < (found.score or 0)
    assert harmless == Action("uvr", score=harmless.score, threshold=1.0)
    tokens = [[int(token) for token in line] for line in mask_of(handle, 1)]
    done: dict[str, Any] = {"action": "regulated", "steps": (0, 4), "strength": 1.0 if name == "kontext" else 0.75, "mask": tokens}
    assert found == Action("uvr", True, "weapon", found.score, 1.0, **done)
    assert handle.run is not None
    assert handle.run.events == [{"event": "localised", "step": 0, "image": 1, "tokens": int(np.sum(tokens)), "stream": "image"}]


@pytest.mark.parametrize(("name", "editing"), [("flux", False), ("sd3", False), ("kontext", False), ("kontext", True)])
def test_what_is_near_the_published_method_runs(name: str, editing: bool) -> None:
    pipe = tiny_pipeline(name)
    expected = sample(pipe, BATCH, guided=False)
    with guard(pipe, UVR.near_published(anchors(name), editing=editing)) as handle:
        images = sample(pipe, BATCH, guided=False)
    assert [record.flagged for record in handle.records] == [False, True, False, True]
    assert [torch.equal(*pair) for pair in zip(images, expected, strict=True)] == [True, False, True, False]
    assert torch.isfinite(images).all()


@every_pipeline
def test_a_gate_confines_it(name: str) -> None:
    """Anchors that find something everywhere, a detector that flags one prompt of two."""
    pipe, prompts = tiny_pipeline(name), [SAFE[0], UNSAFE[0]]
    expected = sample(pipe, prompts)
    with guard(pipe, uvr(name, -NEVER)):
        everywhere = sample(pipe, prompts)
    with guard(pipe, Gate(detector=Containing(), method=uvr(name, -NEVER))) as handle:
        gated = sample(pipe, prompts)
    assert [record.actions[0].action for record in handle.records] == ["none", "regulated"]
    assert torch.equal(gated[0], expected[0])
    assert not torch.equal(everywhere[0], expected[0])
    assert torch.allclose(gated[1], everywhere[1], atol=1e-5)


def test_behind_a_gate_only_flagged_images_are_in_the_log(flux: Any) -> None:
    with guard(flux, Gate(detector=Containing(), method=uvr("flux", -NEVER))) as handle:
        sample(flux, [SAFE[0], UNSAFE[0]])
    assert handle.run is not None
    assert {event["image"] for event in handle.run.events} == {1}


def test_without_a_reference_image_there_is_none_to_search() -> None:
    """Kontext makes pictures from nothing, too."""
    pipe = tiny_pipeline("kontext")
    site = PROBES["kontext"].replace("image", "reference")
    arguments: dict[str, Any] = {"height": 24, "width": 24, "num_inference_steps": 2, "max_area": 24 * 24, "_auto_resize": False}

    def picture() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt=SAFE[0], output_type="np", generator=generator, max_sequence_length=12, **arguments).images

    expected = picture()
    with guard(pipe, UVR(anchors=anchors("kontext", NEVER), reference_anchors=anchors("kontext", -NEVER, site=site))) as handle:
        assert np.array_equal(picture(), expected)
    assert not handle.records[0].flagged


def begun_late(name: str, strength: float, *methods: Method, steps: int = 10) -> tuple[Tensor, Guard]:
    """Image to image from grey, and the guard."""
    pipe = IMAGE_TO_IMAGE[name](**tiny_pipeline(name).components)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.transformer.config.sample_size * pipe.vae_scale_factor if name == "sd3" else 24
    source = torch.full((1, 3, size, size), 0.5)
    with guard(pipe, *methods) as handle:
        images = sample(pipe, UNSAFE[0], image=source, strength=strength, steps=steps, guided=False, height=size, width=size)
    return images, handle


@generators
def test_a_generation_that_begins_late_is_looked_at_where_it_is(name: str) -> None:
    """With what anchors know of its noise level, not of pure noise; for a share of the whole schedule, as nothing stands fast after one step."""
    seen: list[float] = []

    class Watched(Anchors):
        def scores(self, tokens: Tensor, progress: float, grid: tuple[int, int]) -> Tensor:
            seen.append(progress)
            return super().scores(tokens, progress, grid)

    begun_late(name, 0.5, UVR(anchors=Watched(**vars(anchors(name, NEVER))), localise=0.1, late=0.3))
    assert seen == pytest.approx([0.5, 0.6, 0.7])
    seen.clear()
    begun_late(name, 1.0, UVR(anchors=Watched(**vars(anchors(name, NEVER))), localise=0.1, late=0.3))
    assert seen == [0.0], "from noise, as long as `localise` says"


@generators
def test_where_a_generation_begins_late_the_level_does_for_tau(name: str) -> None:
    """In its first steps only, and unless a threshold is given."""
    easily = anchors(name, NEVER, levels=(-NEVER,))
    _, handle = begun_late(name, 0.5, UVR(anchors=easily, eager=0.1))
    assert handle.records[0].actions[0].steps == (0, 5)
    assert handle.records[0].actions[0].threshold == -NEVER
    for fields, strength in (({"eager": 0.0}, 0.5), ({"threshold": NEVER}, 0.5), ({}, 1.0)):
        assert not begun_late(name, strength, UVR(anchors=easily, **fields))[1].records[0].flagged


@generators
def test_what_anchors_know_nothing_of_is_refused(name: str) -> None:
    few = anchors(name, NEVER, moments=(0.0, 0.1, 0.2, 0.3))
    begun_late(name, 1.0, UVR(anchors=few))
    with pytest.raises(ArtefactError, match=r"image to image begins late.*without --steps"):
        begun_late(name, 0.4, UVR(anchors=few))


@pytest.mark.parametrize(("name", "image"), [("testbed/flux", None), ("testbed/kontext", Scene((None, "car"), "beach"))])
def test_bundled_anchors_tell_a_knife_from_a_spoon(name: str, image: Scene | None) -> None:
    """On the testbed, generating and editing; what is not flagged is bit-identical."""
    prompts = ["a dog and a knife on the beach", "a dog and a spoon on the beach"]
    if image is not None:
        prompts = ["add a knife", "add a tree"]
    sources = [None, None] if image is None else [render(image), render(Scene(("cat", None), "sea"))]
    cases = [Case(str(i), prompt, False, seed=i, image=source) for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True))]
    generator = Generator(load_pipeline(name), call_settings(name))
    before = generator(cases)
    with guard(generator.pipe, *build(["uvr"], name)) as handle:
        after = generator(cases)
    assert [record.flagged for record in handle.records] == [True, False]
    assert handle.records[0].actions[0].concept == "knife"
    assert np.array_equal(before[1], after[1])
    pictures = [(pixels * 255).round().astype(np.uint8) for pixels in (before[0], after[0])]
    assert ["knife" in sight.objects for sight in Classifier().look(pictures)] == [True, False]
