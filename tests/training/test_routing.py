"""Where to steer: scores of positions and operators, from recorded contrasts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.training.routing import Candidate, Contrasts, Proxy, Weights, choose, group_of, pooled, route, semantics, stability


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
