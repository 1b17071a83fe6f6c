"""Subspaces, and feature maps in the Fourier domain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.spectrum import attenuate, grid_of
from safelight.subspace import basis, onto, out_of, standing_out

SEEDS = st.integers(0, 10_000)


@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(1, 6), width=st.integers(6, 12))
def test_projections_are_projections(seed: int, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors, other = torch.randn(count, width, generator=generator), torch.randn(3, width, generator=generator)
    space = basis(vectors)
    assert torch.allclose(space @ space.T, torch.eye(len(space)), atol=1e-4)
    assert torch.allclose(onto(space, vectors), vectors, atol=1e-3)
    assert torch.allclose(onto(space, onto(space, other)), onto(space, other), atol=1e-3)
    assert (out_of(space, other) @ vectors.T).abs().max() < 1e-2
    assert torch.allclose(onto(space, other) + out_of(space, other), other, atol=1e-5)


def test_a_basis_has_the_rank_of_its_vectors() -> None:
    assert basis(torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0]])).shape == (2, 3)
    assert basis(torch.zeros(2, 3)).shape == (0, 3)


def test_what_stands_out() -> None:
    assert standing_out(torch.tensor([1.0, 1.0, 1.5]), 0.01, 0).tolist() == [False, False, True]
    assert standing_out(torch.tensor([1.0, 1.0, 1.5]), 0.6, 0).tolist() == [False, False, False]
    assert standing_out(torch.tensor([2.0]), 0.01, 1.0).tolist() == [True]
    assert standing_out(torch.tensor([1.0]), 0.01, 1.0).tolist() == [False]


@settings(deadline=None)
@given(seed=SEEDS, height=st.integers(3, 7), width=st.integers(3, 7), scale=st.floats(0, 0.95))
def test_only_stronger_low_frequencies_are_attenuated(seed: int, height: int, width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, height * width, 3, generator=generator)
    assert torch.allclose(attenuate(tokens, tokens * 2, (height, width), scale, 1), tokens, atol=1e-5), "nothing is stronger"
    changed = attenuate(tokens, tokens / 2, (height, width), scale, 0)
    mean, before = changed.mean(dim=1), tokens.mean(dim=1)  # with a cutoff of 0, only the mean is low
    assert torch.allclose(mean, scale * before, atol=1e-4)
    assert torch.allclose(changed - mean[:, None], tokens - before[:, None], atol=1e-4)


def test_grids_of_coarser_blocks() -> None:
    assert [grid_of(n, (12, 16)) for n in (192, 48, 12, 4, 1)] == [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    assert grid_of(35, (10, 14)) == (5, 7)
    with pytest.raises(ValueError, match="50 tokens are no coarser grid"):
        grid_of(50, (12, 16))
