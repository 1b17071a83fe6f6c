"""Regulated attention equals attention whose probabilities are literally scaled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from safelight.flow import Heads
from safelight.regulation import Group, regulate

TEXT, IMAGE, REFERENCE = 3, 6, 6
SPANS: dict[Any, slice] = {"text": slice(0, 3), "image": slice(3, 9), "reference": slice(9, 15)}
LAMBDAS = torch.tensor([0.0, 0.2, 0.4, 1.0, 1.05, 3.0])

either_way = pytest.mark.parametrize("renormalise", [False, True], ids=["V scaled", "log λ"])


def made(seed: int = 0, batch: int = 2, tokens: int = 15) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    return Heads(*torch.randn(3, batch, 2, tokens, 8, generator=generator), SPANS, SPANS)


def drawn(seed: int, batch: int = 2, keys: int = 15) -> Tensor:
    """Factors [batch, keys] of all kinds, also zeros; not all of them are."""
    factors = LAMBDAS[torch.randint(len(LAMBDAS), (batch, keys), generator=torch.Generator().manual_seed(seed))]
    factors[:, 4] = 0.4
    return factors


def literally(heads: Heads, factors: Tensor, renormalise: bool) -> Tensor:
    """The formula with an attention matrix; factors are [batch, queries, keys]."""
    logits = heads.query @ heads.key.transpose(-1, -2) / heads.query.shape[-1] ** 0.5
    scaled = logits.softmax(-1) * factors[:, None]
    if renormalise:
        scaled = scaled / scaled.sum(-1, keepdim=True)
    return scaled @ heads.value


@dataclass
class Plain:
    """Plain attention that remembers what it was asked."""

    asked: list[Heads] = field(default_factory=list)

    def __call__(self, heads: Heads) -> Tensor:
        self.asked.append(heads)
        return scaled_dot_product_attention(heads.query, heads.key, heads.value, attn_mask=heads.bias)


def never() -> Tensor:
    raise AssertionError("the base is not needed")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_each_group_of_queries_has_factors_of_its_own(seed: int, renormalise: bool) -> None:
    """Text, image and reference queries as in an edit: three fused calls, no base."""
    heads, attend = made(seed), Plain()
    factors = {stream: drawn(seed + i) for i, stream in enumerate(SPANS)}
    groups = [Group(SPANS[stream], factors[stream]) for stream in SPANS]
    expected = literally(
        heads, torch.cat([factors[s][:, None].expand(-1, heads.query[:, :, SPANS[s]].shape[2], -1) for s in SPANS], 1), renormalise
    )
    for order in (groups, groups[::-1]):
        assert torch.allclose(regulate(heads, order, attend, never, renormalise=renormalise), expected, atol=1e-5)
    assert [asked.query.shape[2] for asked in attend.asked[:3]] == [TEXT, IMAGE, REFERENCE]


@either_way
@pytest.mark.parametrize("stream", SPANS)
def test_queries_in_no_group_are_the_bases(stream: str, renormalise: bool) -> None:
    heads, factors, asked = made(), drawn(1), []

    def base() -> Tensor:
        asked.append(1)
        return scaled_dot_product_attention(heads.query, heads.key, heads.value)

    result = regulate(heads, [Group(SPANS[stream], factors)], Plain(), base, renormalise=renormalise)
    everywhere = torch.ones(2, 15, 15)
    everywhere[:, SPANS[stream]] = factors[:, None]
    assert asked == [1]
    assert torch.allclose(result, literally(heads, everywhere, renormalise), atol=1e-5)
    others = torch.ones(15, dtype=torch.bool)
    others[SPANS[stream]] = False
    assert torch.equal(result[:, :, others], base()[:, :, others])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.booleans(), st.data())
def test_samples_have_tokens_of_their_own(seed: int, renormalise: bool, covered: bool, data: st.DataObject) -> None:
    """Groups of tokens differ in number from sample to sample; padding changes nothing, and later groups overrule earlier ones."""
    heads, attend, factors, own = made(seed, batch=3), Plain(), drawn(seed, 3), drawn(seed + 1, 3)
    order = torch.stack([torch.randperm(15, generator=torch.Generator().manual_seed(seed + row)) for row in range(3)])
    counts = torch.tensor([data.draw(st.integers(0, 7)) for _ in range(3)])
    tokens, valid = order[:, :7], torch.arange(7) < counts[:, None]
    matrix = factors[:, None].repeat(1, 15, 1) if covered else torch.ones(3, 15, 15)
    for row in range(3):
        matrix[row, tokens[row, valid[row]]] = own[row]
    groups = [Group(slice(0, 15), factors)] if covered else []
    plain = scaled_dot_product_attention(heads.query, heads.key, heads.value)
    result = regulate(heads, [*groups, Group(tokens, own, valid)], attend, never if covered else lambda: plain, renormalise=renormalise)
    assert torch.allclose(result, literally(heads, matrix, renormalise), atol=1e-5)
    if not covered:
        left = torch.ones(3, 15, dtype=torch.bool)
        for row in range(3):
            left[row, tokens[row, valid[row]]] = False
        assert torch.equal(result.transpose(1, 2)[left], plain.transpose(1, 2)[left])


@either_way
def test_tokens_without_padding(renormalise: bool) -> None:
    heads, own = made(), drawn(2)
    tokens = torch.tensor([[3, 14], [0, 7]])
    plain = scaled_dot_product_attention(heads.query, heads.key, heads.value)
    result = regulate(heads, [Group(tokens, own)], Plain(), lambda: plain, renormalise=renormalise)
    matrix = torch.ones(2, 15, 15)
    matrix[torch.arange(2)[:, None], tokens] = own[:, None]
    assert torch.allclose(result, literally(heads, matrix, renormalise), atol=1e-5)


def test_a_factor_of_0_renormalised_is_attention_without_those_keys() -> None:
    heads, factors = made(), torch.ones(2, 15)
    factors[:, :9] = 0
    result = regulate(heads, [Group(slice(None), factors)], Plain(), never, renormalise=True)
    fewer = scaled_dot_product_attention(heads.query, heads.key[:, :, 9:], heads.value[:, :, 9:])
    assert torch.isfinite(result).all()
    assert torch.allclose(result, fewer, atol=1e-5)


@pytest.mark.parametrize(
    ("stretches", "covered"),
    [
        ([slice(None)], True),
        ([slice(0, 15)], True),
        ([slice(9, 15), slice(0, 9)], True),
        ([slice(0, 0), slice(0, 9), slice(-6, None)], True),
        ([slice(0, 9)], False),
        ([slice(1, 15)], False),
        ([slice(0, 4), slice(5, 15)], False),
        ([], False),
    ],
)
def test_the_base_is_asked_for_only_if_needed(stretches: list[slice], covered: bool) -> None:
    heads, asked = made(), []

    def base() -> Tensor:
        asked.append(1)
        return scaled_dot_product_attention(heads.query, heads.key, heads.value)

    result = regulate(heads, [Group(stretch, torch.ones(2, 15)) for stretch in stretches], Plain(), base, renormalise=False)
    assert bool(asked) is not covered
    assert torch.allclose(result, base(), atol=1e-5)


@either_way
def test_nothing_of_the_size_of_an_attention_matrix_is_made(renormalise: bool) -> None:
    heads, attend = made(), Plain()
    regulate(heads, [Group(SPANS[stream], drawn(3)) for stream in SPANS], attend, never, renormalise=renormalise)
    assert sum(asked.query.shape[2] for asked in attend.asked) == 15, "together, the calls cost as much as one"
    for asked in attend.asked:
        assert (asked.bias is not None) is renormalise
        assert asked.bias is None or asked.bias.shape == (2, 1, 1, 15)


def test_what_was_given_is_left_as_it_was() -> None:
    heads, plain = made(), torch.zeros(2, 2, 15, 8)
    before = [tensor.clone() for tensor in (heads.query, heads.key, heads.value)]
    regulate(heads, [Group(SPANS["image"], drawn(4))], Plain(), lambda: plain, renormalise=False)
    assert all(torch.equal(tensor, old) for tensor, old in zip((heads.query, heads.key, heads.value), before, strict=True))
    assert not plain.any()


def test_half_precision_stays_half_precision() -> None:
    heads = Heads(*(tensor.bfloat16() for tensor in (made().query, made().key, made().value)), SPANS, SPANS)
    assert regulate(heads, [Group(slice(None), drawn(5))], Plain(), never, renormalise=False).dtype == torch.bfloat16
