"""Decoders that move to a new domain, harmful features, and the gate's reading of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safelight.nets.sae import SAE
from safelight.training.harm import alarm, harmful_features, statistics
from safelight.training.transfer import Domain, TransferConfig, adapt


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
