"""Sparse autoencoders: sparsity, unit rows, what freezes, and what a basis lets through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.errors import ArtefactError
from safelight.nets.sae import SAE, batch_threshold, fraction_of_variance_unexplained, geometric_median, principal_basis
from safelight.training.sae_learning import Learner, SAEConfig, learn

CONFIG = SAEConfig(expansion=4, k=3, lr=1.5e-3, batch=256, epochs=40, dead_after=20_000, revived=8)


def dictionary_tokens(count: int = 4096, width: int = 12, atoms: int = 24, active: int = 3, seed: int = 0) -> torch.Tensor:
    """Tokens made of a few atoms each, so that a sparse code exists."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.nn.functional.normalize(torch.randn(atoms, width, generator=generator), dim=1)
    chosen = torch.rand(count, atoms, generator=generator).topk(active, dim=1).indices
    codes = torch.zeros(count, atoms).scatter(1, chosen, 1 + torch.rand(count, active, generator=generator))
    return codes @ basis + 0.5


@given(k=st.integers(1, 8), tokens=st.integers(1, 20), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_sparsities_keep_what_they_promise(k: int, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    sae, seen = SAE(6, 16, k).requires_grad_(False), torch.randn(tokens, 6)
    assert int((sae.features(seen, "topk").values > 0).sum(-1).max()) <= k
    batch = sae.features(seen, "batch")
    assert int((batch.values > 0).sum()) <= k * tokens
    assert torch.equal(batch.values[batch.values > 0], batch.before[batch.values > 0]), "what is kept is not changed"
    assert float((batch.before * (batch.values == 0)).max()) <= float(batch_threshold(batch.before, k)), "the largest are kept"


def test_some_features_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    sae, seen, chosen = SAE(6, 16, 2), torch.randn(5, 7, 6), torch.tensor([3, 0, 9])
    sae.threshold.fill_(0.2)
    torch.testing.assert_close(sae.some(seen, chosen), sae.features(seen).values[..., chosen])


def test_k_must_fit() -> None:
    with pytest.raises(ValueError, match="k = 40 features of 16"):
        SAE(4, 16, 40)
    with pytest.raises(ValueError, match="9 directions don't fit into a width of 8"):
        SAE(9, 16, 2, full_width=8)


def test_training_explains_most_of_sparse_tokens(tmp_path: Path) -> None:
    tokens = dictionary_tokens()
    sae, report = learn(tokens, CONFIG, tmp_path)
    assert report.fvu < 0.15
    assert report.dead < 0.2
    assert abs(report.active - CONFIG.k) < 0.6
    seen = sae.inward(tokens)
    assert float(fraction_of_variance_unexplained(seen, sae.decoder(sae.features(seen).values))) < 0.15
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "curve.png").is_file()


def test_decoder_rows_have_unit_norm(tmp_path: Path) -> None:
    sae, _ = learn(dictionary_tokens(), SAEConfig(expansion=4, k=3, batch=256, epochs=2), tmp_path)
    torch.testing.assert_close(sae.decoder.weight.norm(dim=1), torch.ones(sae.latents), atol=2e-3, rtol=0)  # stored in half precision


def test_the_gradient_along_decoder_rows_vanishes() -> None:
    torch.manual_seed(0)
    sae = SAE(12, 48, 3)
    Learner(sae, CONFIG).loss(dictionary_tokens(64)).backward()
    assert sae.decoder.weight.grad is not None
    along = (sae.decoder.weight.grad * sae.decoder.weight.detach()).sum(1)
    assert float(along.abs().max()) < 1e-6 * float(sae.decoder.weight.grad.norm(dim=1).max()) + 1e-7


def test_dead_latents_are_revived() -> None:
    torch.manual_seed(0)
    sae = SAE(12, 48, 3)
    learner, tokens = Learner(sae, SAEConfig(dead_after=100, revived=8)), dictionary_tokens(128)
    with torch.no_grad():
        sae.encoder.weight[:20] *= 0.05  # they still see something, but never enough to be among the first
        sae.encoder.bias[:20] = 0.01
    for _ in range(2):
        learner.loss(tokens)
    assert bool((learner.idle[:20] > 100).any())
    learner.loss(tokens).backward()
    assert sae.encoder.weight.grad is not None
    dead = learner.idle > 100
    assert float(sae.encoder.weight.grad[dead].abs().sum()) > 0, "the auxiliary loss reaches dead latents"


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    import safelight.training.sae_learning as module

    tokens = dictionary_tokens()
    whole, _ = learn(tokens, CONFIG, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Interrupted

    training = module.Training.run
    module.Training.run = lambda self, every=50, save_seconds=0.0: training(self, every, 0.0)  # type: ignore[method-assign]
    try:
        with pytest.raises(Interrupted):
            learn(tokens, CONFIG, tmp_path / "parts", stop)
    finally:
        module.Training.run = training  # type: ignore[method-assign]
    resumed, _ = learn(tokens, CONFIG, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert value is None or torch.equal(value, resumed.state_dict()[name]), name


def test_a_folder_holds_one_training(tmp_path: Path) -> None:
    tokens = dictionary_tokens(1024)
    config = SAEConfig(expansion=2, k=2, batch=128, epochs=1)
    learn(tokens, config, tmp_path)
    with pytest.raises(ArtefactError, match="another SAE"):
        learn(tokens + 1, config, tmp_path)


def test_bad_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="100 tokens are too few for batches of 256"):
        learn(torch.randn(100, 4), CONFIG, tmp_path)
    broken = torch.randn(1000, 4)
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        learn(broken, CONFIG, tmp_path)


def test_what_lies_outside_the_basis_passes() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(200, 10) * torch.linspace(3, 0.1, 10)
    sae = SAE(4, 16, 2, full_width=10)
    assert sae.basis is not None
    sae.basis.copy_(principal_basis(tokens, 4))
    torch.testing.assert_close(sae.basis.T @ sae.basis, torch.eye(4), atol=1e-5, rtol=0)
    change = sae.outward(torch.randn(200, 4))
    outside = torch.eye(10) - sae.basis @ sae.basis.T
    assert float((change @ outside).abs().max()) < 1e-5
    torch.testing.assert_close(sae.inward(sae.outward(torch.ones(3, 4))), torch.ones(3, 4), atol=1e-5, rtol=0)
    kept = (tokens @ sae.basis).square().sum() / tokens.square().sum()
    assert float(kept) > 0.7, "the basis spans the directions of most variance"


@given(centre=st.floats(-3, 3), spread=st.floats(0.1, 2))
@settings(max_examples=20, deadline=None)
def test_the_geometric_median_is_the_centre_of_what_is_symmetric(centre: float, spread: float) -> None:
    half = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) * spread
    median = geometric_median(torch.cat([half, -half]) + centre)
    torch.testing.assert_close(median, torch.full((3,), centre), atol=1e-3, rtol=0)


def test_the_geometric_median_is_not_led_away_by_outliers() -> None:
    tokens = torch.randn(101, 3, generator=torch.Generator().manual_seed(1))
    tokens[0] = 1e4
    assert float(geometric_median(tokens).norm()) < 1
