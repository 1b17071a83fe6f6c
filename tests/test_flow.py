"""The records that flow through a generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelight.flow import Call, put
from safelight.site import Layout


def call_of(samples: int, guided: bool, turn: int = 0) -> Call:
    """A call whose tensors hold the number of their row."""
    rows = samples * 2 if guided else samples
    numbers = torch.arange(float(rows))
    cond = slice(rows - samples, rows) if turn == 0 else slice(0, 0)
    return Call(
        latents=numbers[:, None, None].expand(rows, 3, 2), text=numbers[:, None, None].expand(rows, 5, 4), timestep=numbers,
        layout=Layout(5, 3), cond=cond, samples=tuple(range(samples)) if turn == 0 else (), turn=turn, pooled=numbers[:, None].expand(rows, 4),
        rows={"guidance": numbers}, rest={"shared": "all"},
    )  # fmt: skip


@given(st.integers(1, 5), st.booleans(), st.data())
def test_take_keeps_the_rows_of_some_samples(samples: int, guided: bool, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, samples - 1), min_size=1, unique=True))
    call = call_of(samples, guided)
    taken = call.take(positions)
    starts = (0, samples) if guided else (0,)
    rows = [start + position for start in starts for position in positions]
    for tensor in (taken.latents, taken.text, taken.timestep, taken.pooled, taken.rows["guidance"]):
        assert tensor is not None
        assert tensor.reshape(len(rows), -1)[:, 0].tolist() == rows
    assert taken.samples == tuple(positions)
    assert taken.text[taken.cond][:, 0, 0].tolist() == rows[-len(positions) :]
    alone = call.take(positions, conditional=True)
    assert alone.text[:, 0, 0].tolist() == rows[-len(positions) :]
    assert alone.cond == slice(0, len(positions))
    assert alone.rest == call.rest


@given(st.integers(1, 5), st.data())
def test_take_works_on_a_call_without_conditional_rows(samples: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, samples - 1), min_size=1, unique=True))
    taken = call_of(samples, guided=False, turn=1).take(positions)
    assert taken.text[:, 0, 0].tolist() == positions
    assert not taken.conditional
    assert taken.samples == ()


@given(st.integers(1, 4), st.booleans())
def test_with_text_changes_the_conditional_rows_only(samples: int, guided: bool) -> None:
    call = call_of(samples, guided)
    changed = call.with_text(torch.full((samples, 5, 4), -1.0), torch.full((samples, 4), -2.0))
    assert (changed.text[call.cond] == -1).all()
    assert changed.pooled is not None
    assert call.pooled is not None
    assert (changed.pooled[call.cond] == -2).all()
    assert torch.equal(changed.text[: call.cond.start], call.text[: call.cond.start])
    assert torch.equal(call.text[:, 0, 0], torch.arange(float(len(call.text)))), "the original was changed"
    assert torch.equal(call.with_text(changed.text[call.cond]).pooled, call.pooled)  # type: ignore[arg-type]


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        call_of(1, True).turn = 2  # type: ignore[misc]


def test_put_copies_and_keeps_the_type() -> None:
    tensor = torch.zeros(3, 2, dtype=torch.half)
    changed = put(tensor, [1], torch.ones(1, 2))
    assert changed.dtype == torch.half
    assert changed.sum() == 2
    assert tensor.sum() == 0


@given(st.floats(0, 1), st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 2**16))
def test_mixed_predictions_make_mixed_latents(weight: float, slope: float, offset: float, seed: int) -> None:
    """What `coupled` rests on: lerp commutes with a scheduler that is affine in the prediction."""
    generator = torch.Generator().manual_seed(seed)
    own, safe, latents = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.double)

    def advance(noise: torch.Tensor) -> torch.Tensor:
        return offset * latents + slope * noise

    mixed = advance(torch.lerp(own, safe, weight))
    assert torch.allclose(mixed, torch.lerp(advance(own), advance(safe), weight), atol=1e-9)
