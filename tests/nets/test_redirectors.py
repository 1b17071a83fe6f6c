"""SafeRedir's networks: what they compute, and which defects they don't share."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from safelight.nets.official_redirector import OfficialRedirector
from safelight.nets.redirector import Redirector, redirect

STORED = Path(__file__).parent / "official_redirector.safetensors"
"""Outputs of the authors' own code (MIT), with the weights that `fill` gives."""


def fill(net: nn.Module) -> nn.Module:
    """Weights that depend on nothing but their names and shapes."""
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(tensor.shape, generator=chance) * (0.05 if tensor.ndim > 1 else 0.1)
            tensor.copy_(values.abs() + 1 if name.endswith("running_var") else values)
    return net.eval().requires_grad_(False)


def inputs(batch: int = 2, channels: int = 4, tokens: int = 77, width: int = 768, side: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    latents, text = torch.randn(batch, channels, side, side, generator=chance), torch.randn(batch, tokens, width, generator=chance)
    return latents, text, torch.linspace(981, 1, batch)


def test_the_official_network_gives_the_official_outputs() -> None:
    logits, aim = fill(OfficialRedirector())(*inputs())
    stored = load_file(STORED)
    for name, found in (("logits", logits), ("delta", aim.delta[:, ::11, ::32]), ("mask", aim.mask), ("alpha", aim.alpha)):
        assert torch.allclose(found, stored[name], atol=1e-5), name


def test_the_official_network_has_the_official_size() -> None:
    assert sum(parameter.numel() for parameter in OfficialRedirector().parameters()) == pytest.approx(14.57e6, rel=1e-3)


def small(pooled: int = 0) -> Redirector:
    torch.manual_seed(0)
    return Redirector(4, 32, pooled, width=32, rank=8).eval().requires_grad_(False)


def directions(delta: Tensor) -> Tensor:
    return nn.functional.normalize(delta, dim=-1)


def test_every_token_has_a_direction_of_its_own_unlike_in_the_official_network() -> None:
    latents, text, times = inputs(2, 4, 7, 32, 16)
    ours = directions(small()(latents, text, times)[1].delta)
    official = directions(fill(OfficialRedirector(4, 32, 7))(latents, text, times)[1].delta)
    assert float((official[:, 1:] * official[:, :1]).sum(-1).min()) > 1 - 1e-5
    assert float((ours[:, 1:] * ours[:, :1]).sum(-1).min()) < 0.999


def test_permuting_tokens_permutes_the_deltas() -> None:
    latents, text, times = inputs(2, 4, 7, 32, 16)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    plain, permuted = (small()(latents, tokens, times)[1].delta for tokens in (text, text[:, order]))
    assert torch.allclose(permuted, plain[:, order], atol=1e-5)


@pytest.mark.parametrize(("tokens", "side"), [(1, 8), (16, 16), (77, 32)])
def test_any_prompt_length_and_latent_size(tokens: int, side: int) -> None:
    logits, aim = small()(*inputs(3, 4, tokens, 32, side))
    assert logits.shape == (3, 2)
    assert aim.mask.shape == (3, tokens)
    assert aim.delta.shape == (3, tokens, 32)
    assert aim.pooled is None


def test_rows_do_not_depend_on_their_batch() -> None:
    latents, text, times = inputs(3, 4, 7, 32, 16)
    together, alone = small()(latents, text, times), small()(latents[1:2], text[1:2], times[1:2])
    assert torch.allclose(together[0][1:2], alone[0], atol=1e-5)
    assert torch.allclose(together[1].delta[1:2], alone[1].delta, atol=1e-5)


def test_the_pooled_embedding_is_read_and_moved() -> None:
    latents, text, times = inputs(2, 4, 7, 32, 16)
    net, pooled = small(pooled=12), torch.randn(2, 12)
    (logits, aim), (others, _) = net(latents, text, times, pooled), net(latents, text, times, pooled + 1)
    assert aim.pooled is not None
    assert aim.pooled[0].shape == (2, 12)
    assert not torch.equal(logits, others)


def test_half_precision_agrees() -> None:
    latents, text, times = inputs(2, 4, 7, 32, 16)
    whole, half = small()(latents, text, times), small().half()(latents.half(), text.half(), times)
    assert torch.allclose(whole[0], half[0].float(), atol=2e-2)
    assert torch.allclose(whole[1].mask, half[1].mask.float(), atol=2e-2)


@given(st.integers(1, 6), st.integers(1, 8), st.floats(0, 4), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_no_token_moves_further_than_the_scale_allows(tokens: int, width: int, scale: float, concepts: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    text = torch.randn(2, tokens, width, generator=chance)
    ways = [(torch.randn(2, tokens, width, generator=chance), torch.rand(2, tokens, 1, generator=chance)) for _ in range(concepts)]
    moved, used = redirect(text, ways, scale)
    assert bool(((moved - text).norm(dim=-1) <= scale * text.norm(dim=-1) * (1 + 1e-4) + 1e-5).all())
    assert bool((used <= 1 + 1e-6).all())


def test_no_strength_no_move_and_more_strength_more_move() -> None:
    text, delta = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    still, _ = redirect(text, [(delta, torch.zeros(1, 3, 1))], 1.25)
    assert torch.equal(still, text)
    some, more = (redirect(text, [(delta, torch.full((1, 3, 1), share))], 1.25)[0] for share in (0.2, 0.4))
    assert torch.allclose((more - text).norm(dim=-1), 2 * (some - text).norm(dim=-1), rtol=1e-4)
