"""Anchors score tokens as the paper says, keep across files, and refuse what they don't fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from safelight import guard
from safelight.anchors import Anchors, fingerprint
from safelight.backbone import Backbone
from safelight.calibration import Calibration
from safelight.errors import ArtefactError
from safelight.methods.uvr import UVR
from safelight.site import Layout
from safelight.testing import sample, tiny_pipeline

SITE, HEADS, WIDTH = "joint.1.attention:image", 2, 8


def made(*, clusters: int = 1, seed: int = 0, **changes: Any) -> Anchors:
    """Anchors of three moments and two concepts."""
    generator = torch.Generator().manual_seed(seed)
    weights, bias = torch.randn(3, 2, clusters, WIDTH, generator=generator), torch.zeros(3, 2, clusters)
    facts: dict[str, Any] = {
        "moments": (0.0, 0.2, 0.6), "concepts": ("knife", "gun"), "thresholds": (0.5, 0.6), "levels": (0.4, 0.6), "site": SITE,
        "heads": HEADS, "kind": "raw", "smooth": False,
    }  # fmt: skip
    return Anchors(weights=weights, bias=bias, **facts | changes)


def tokens(grid: tuple[int, int] = (3, 5), seed: int = 7, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(seed))


def test_raw_scores_are_the_papers() -> None:
    """s(n) = mean over heads of out_h(n) · ō_h, by the square root of a head's width."""
    anchors, own = made(), tokens()
    outputs, directions = own.unflatten(-1, (HEADS, -1)), anchors.weights[0, :, 0].unflatten(-1, (HEADS, -1))
    expected = torch.einsum("bnhd,chd->bcnh", outputs, directions).mean(-1) / math.sqrt(WIDTH / HEADS)
    scores = anchors.scores(own, 0.0, (3, 5))
    assert scores.shape == (2, 2, 3, 5)
    assert torch.allclose(scores, expected.unflatten(-1, (3, 5)), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 999), st.booleans())
def test_the_mean_anchor_is_as_good_as_all(count: int, seed: int, smooth: bool) -> None:
    """The average of K anchors' raw scores is the score of their mean: linear, also when smoothed."""
    each = [made(seed=seed + i, smooth=smooth) for i in range(count)]
    mean = replace(each[0], weights=torch.stack([anchors.weights for anchors in each]).mean(0))
    average = torch.stack([anchors.scores(tokens(), 0.2, (3, 5)) for anchors in each]).mean(0)
    assert torch.allclose(mean.scores(tokens(), 0.2, (3, 5)), average, atol=1e-5)


def test_cosine_scores() -> None:
    anchors = made(kind="cosine")
    scores = anchors.scores(tokens(), 0.0, (3, 5)).flatten(2)
    for concept in range(2):
        assert torch.allclose(scores[:, concept], cosine_similarity(tokens(), anchors.weights[0, concept], dim=-1), atol=1e-6)
    assert torch.allclose(anchors.scores(tokens() * 9, 0.0, (3, 5)).flatten(2), scores, atol=1e-6), "length doesn't matter"


def test_whitened_scores_are_affine() -> None:
    anchors = replace(made(kind="whitened"), bias=torch.arange(6.0).view(3, 2, 1))
    scores = anchors.scores(tokens(), 0.6, (3, 5)).flatten(2)
    expected = tokens() @ anchors.weights[2, :, 0].T + torch.tensor([4.0, 5.0])
    assert torch.allclose(scores, expected.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("kind", ["raw", "cosine", "whitened"])
def test_the_best_of_several_clusters_counts(kind: Any) -> None:
    anchors = replace(made(clusters=4, kind=kind), bias=torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(3)))
    alone = [replace(anchors, weights=anchors.weights[:, :, [i]], bias=anchors.bias[:, :, [i]]) for i in range(4)]
    expected = torch.stack([one.scores(tokens(), 0.0, (3, 5)) for one in alone]).amax(0)
    assert torch.allclose(anchors.scores(tokens(), 0.0, (3, 5)), expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(3, 5), (1, 9), (9, 1), (1, 1), (2, 2)])
def test_scores_are_smoothed_over_neighbours(grid: tuple[int, int]) -> None:
    """A mean over 3 x 3 tokens, as far as there are any; a single line has too few neighbours to be smoothed."""
    rough = made().scores(tokens(grid), 0.0, grid)
    smooth = made(smooth=True).scores(tokens(grid), 0.0, grid)
    assert smooth.shape == (2, 2, *grid)
    if min(grid) == 1:
        assert torch.equal(smooth, rough)
        return
    window = np.ones((1, 1, 3, 3))
    expected = ndimage.convolve(rough.numpy(), window, mode="constant") / ndimage.convolve(np.ones(rough.shape), window, mode="constant")
    assert np.allclose(smooth, expected, atol=1e-5)


@pytest.mark.parametrize(("progress", "moment"), [(0.0, 0), (0.09, 0), (0.11, 1), (0.39, 1), (0.41, 2), (1.0, 2)])
def test_the_nearest_moments_anchors_are_used(progress: float, moment: int) -> None:
    anchors = made()
    only = replace(anchors, weights=anchors.weights[[moment]], bias=anchors.bias[[moment]], moments=(0.5,))
    assert torch.equal(anchors.scores(tokens(), progress, (3, 5)), only.scores(tokens(), 0.5, (3, 5)))


@pytest.mark.parametrize(("moments", "progress"), [((0.0, 0.05, 0.1), 0.3), ((0.0, 0.05, 0.1), 1.0), ((0.4, 0.5), 0.1), ((0.0,), 0.2)])
def test_a_look_far_from_every_moment_is_refused(moments: tuple[float, ...], progress: float) -> None:
    """Image to image begins where anchors of the first steps know nothing."""
    few = len(moments)
    anchors = made(moments=moments)
    anchors = replace(anchors, weights=anchors.weights[:few], bias=anchors.bias[:few])
    anchors.scores(tokens(), moments[-1] + 0.9 * anchors.reach, (3, 5))
    with pytest.raises(ArtefactError, match=f"look at {progress:.0%} of it.*safelight train uvr` without --steps.*uvr.localise"):
        anchors.scores(tokens(), progress, (3, 5))


def test_half_precision_tokens_give_single_precision_scores() -> None:
    scores = made().scores(tokens().bfloat16(), 0.0, (3, 5))
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, made().scores(tokens(), 0.0, (3, 5)), atol=0.05)


def test_some_concepts_only() -> None:
    anchors, swapped = made(), made().only(["gun", "knife"])
    assert swapped.thresholds == (0.6, 0.5)
    assert swapped.levels == (0.6, 0.4)
    assert torch.equal(swapped.scores(tokens(), 0.0, (3, 5)), anchors.scores(tokens(), 0.0, (3, 5)).flip(1))
    with pytest.raises(ValueError, match="no concept 'cat'; they have knife, gun"):
        anchors.only(["cat"])


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    calibration = Calibration.fit([i / 400 for i in range(400)])
    model = {"denoiser": "FluxTransformer2DModel", "blocks": {"joint": 2, "single": 2}, "heads": 2, "weights": 0.1}
    anchors = made(clusters=3, model=model, calibration=calibration, smooth=True)
    anchors.save(tmp_path / "anchors.safetensors")
    loaded = Anchors.load(tmp_path / "anchors.safetensors")
    assert torch.equal(loaded.weights, anchors.weights)
    assert torch.equal(loaded.bias, anchors.bias)
    for name in vars(anchors).keys() - {"weights", "bias"}:
        assert getattr(loaded, name) == getattr(anchors, name), name
    assert [path.name for path in tmp_path.iterdir()] == ["anchors.safetensors"], "nothing half-written is left"


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Changes the tensors and facts of a file."""
    with safe_open(path, "pt") as file:
        metadata, own = file.metadata(), {name: file.get_tensor(name) for name in ("weights", "bias")}
    facts = json.loads(metadata["facts"])
    change(own, facts)
    save_file(own, path, metadata | {"facts": json.dumps(facts)})


def nan(own: dict[str, Tensor], name: str, value: float = math.nan) -> None:
    own[name].view(-1)[0] = value


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "a fact too few": (lambda t, f: f.pop("moments"), "lacks a part.*moments"),
    "a fact too many": (lambda t, f: f.update(colour="red"), "one part too many.*colour"),
    "no weights": (lambda t, f: t.pop("weights"), "lacks a part of anchors.*bias"),
    "a tensor too many": (lambda t, f: t.update(more=torch.ones(1)), "one too many.*more"),
    "NaN": (lambda t, f: nan(t, "weights"), "contains NaN or infinite anchors"),
    "infinity": (lambda t, f: nan(t, "bias", math.inf), "contains NaN or infinite anchors"),
    "a moment too many": (lambda t, f: f["moments"].append(0.9), "no direction for each moment and concept"),
    "a concept too few": (lambda t, f: f["concepts"].pop(), "no direction for each moment and concept"),
    "flat weights": (lambda t, f: t.update(weights=t["weights"].flatten(2)), "no direction for each moment and concept"),
    "a threshold too few": (lambda t, f: f["thresholds"].pop(), "no threshold for each concept"),
    "a level too many": (lambda t, f: f["levels"].append(0.1), "no threshold for each concept"),
    "an unknown kind": (lambda t, f: f.update(kind="new"), "unknown kind 'new'"),
    "odd heads": (lambda t, f: f.update(heads=3), "width 8 isn't made of 3 heads"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_incomplete_files_are_refused(name: str, tmp_path: Path) -> None:
    change, message = DAMAGES[name]
    made().save(tmp_path / "anchors.safetensors")
    rewritten(tmp_path / "anchors.safetensors", change)
    with pytest.raises(ArtefactError, match=f"{message}.*safelight train uvr"):
        Anchors.load(tmp_path / "anchors.safetensors")


@pytest.mark.parametrize("name", ["thresholds", "levels"])
def test_thresholds_that_are_no_numbers_are_refused(name: str, tmp_path: Path) -> None:
    """No score is above NaN: the guard would never act."""
    made(**{name: (0.5, math.nan)}).save(tmp_path / "anchors.safetensors")
    with pytest.raises(ArtefactError, match="safelight train uvr"):
        Anchors.load(tmp_path / "anchors.safetensors")


def test_no_heads_are_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "anchors.safetensors")
    rewritten(tmp_path / "anchors.safetensors", lambda t, f: f.update(heads=0))
    with pytest.raises(ArtefactError, match="has heads=0, which is no whole number"):
        Anchors.load(tmp_path / "anchors.safetensors")


def other_file(path: Path) -> None:
    save_file({"weights": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "can't be read as anchors"),
        (lambda path: path.write_bytes(b""), "can't be read as anchors"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "can't be read as anchors"),
        (lambda path: path.write_text("not a safetensors file"), "can't be read as anchors"),
        (other_file, "no anchors of this version .*'something else'"),
        (lambda path: save_file({}, path, {"format": "safelight-anchors/0"}), "no anchors of this version .*safelight-anchors/0"),
        (lambda path: save_file({}, path, {"format": "safelight-anchors/1", "facts": "{"}), "damaged facts"),
    ],
    ids=["missing", "empty", "cut off", "text", "other tensors", "other version", "no JSON"],
)
def test_damaged_files_are_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "anchors.safetensors"
    made().save(path)
    damage(path)
    with pytest.raises(ArtefactError, match=f"{message}.*safelight train uvr"):
        Anchors.load(path)


def test_a_file_that_cant_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        made().save(tmp_path / "nowhere" / "anchors.safetensors")


# Which denoisers anchors fit.


def fitted(pipe: Any, site: str = SITE) -> Anchors:
    return made(site=site, model=fingerprint(Backbone.of(pipe), site))


def checked(anchors: Anchors, pipe: Any, **settings: Any) -> None:
    anchors.check(Backbone.of(pipe), **settings)


@pytest.mark.parametrize("name", ["flux", "kontext", "sd3"])
def test_anchors_fit_the_model_they_are_from(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name)
    checked(fitted(pipe), pipe)
    fitted(pipe).save(tmp_path / "anchors.safetensors")
    checked(Anchors.load(tmp_path / "anchors.safetensors"), tiny_pipeline(name))
    pipe.transformer.half()
    checked(fitted(tiny_pipeline(name)), pipe)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_anchors_fit_a_model_with_fused_projections(name: str) -> None:
    pipe = tiny_pipeline(name)
    anchors = fitted(pipe)
    pipe.transformer.fuse_qkv_projections()
    checked(anchors, pipe)


def test_anchors_of_another_model_are_refused(flux: Any) -> None:
    with pytest.raises(ArtefactError, match="denoiser is FluxTransformer2DModel; this one's is SD3Transformer2DModel"):
        checked(fitted(flux), tiny_pipeline("sd3"))


def test_anchors_of_a_model_with_other_blocks_are_refused(flux: Any) -> None:
    anchors = fitted(flux)
    flux.transformer.single_transformer_blocks = nn.ModuleList(list(flux.transformer.single_transformer_blocks)[:1])
    with pytest.raises(ArtefactError, match=r"blocks is .*'single': 2.* this one's is .*'single': 1"):
        checked(anchors, flux)


@pytest.mark.parametrize(("name", "site"), [("flux", "single.7.attention:image"), ("sd3", "single.0.attention:image")])
def test_anchors_for_a_block_that_there_isnt_are_refused(name: str, site: str) -> None:
    with pytest.raises(ArtefactError, match="safelight train uvr"):
        checked(made(site=site), tiny_pipeline(name))


def test_anchors_of_a_model_with_other_heads_are_refused(flux: Any) -> None:
    anchors = fitted(flux)
    with pytest.raises(ArtefactError, match="heads is 4; this one's is 2"):
        checked(replace(anchors, model={**(anchors.model or {}), "heads": 4}), flux)


def test_anchors_of_a_relative_need_leave(flux: Any) -> None:
    relative = tiny_pipeline("flux")
    relative.transformer.transformer_blocks[1].attn.to_v.weight.data[::2] *= 1.2
    with pytest.raises(ArtefactError, match=r"another checkpoint.*transfer=True"):
        checked(fitted(flux), relative)
    checked(fitted(flux), relative, transfer=True)
    with pytest.raises(ArtefactError, match="denoiser is"):
        checked(fitted(flux), tiny_pipeline("sd3"), transfer=True)


def test_tokens_of_another_width_are_refused() -> None:
    made().check_tokens(tokens(), Layout(4, 15))
    with pytest.raises(ArtefactError, match=f"width 8, the probe '{SITE}' gives 6; .*safelight train uvr"):
        made().check_tokens(tokens()[..., :6], Layout(4, 15))


def test_a_guard_checks_its_anchors(flux: Any) -> None:
    """When it is attached, and at the probe."""
    with pytest.raises(ArtefactError, match="denoiser is"):
        guard(flux, UVR(anchors=fitted(tiny_pipeline("sd3"))))
    guard(flux, UVR(anchors=fitted(flux))).remove()
    with guard(flux, UVR(anchors=fitted(flux))), pytest.raises(ArtefactError, match=f"width 8, the probe '{SITE}' gives 32"):
        sample(flux, "a cat on a beach")
    flux.transformer.transformer_blocks[1].attn.to_v.weight.data[::2] *= 1.2
    relatives = fitted(tiny_pipeline("flux"))
    with pytest.raises(ArtefactError, match="another checkpoint"):
        guard(flux, UVR(anchors=relatives))
    guard(flux, UVR(anchors=relatives, transfer=True)).remove()
