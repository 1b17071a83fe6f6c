"""Masks over image tokens equal those of scipy, on any grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from torch import Tensor

from safelight.masks import OUTSIDE, boxed, clean, close, components, dilate, fill_holes, iou, largest

SQUARE, CROSS = np.ones((3, 3), bool), ndimage.generate_binary_structure(2, 1)
MASKS = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)).flatmap(lambda shape: arrays(bool, shape))
EIGHTHS = st.integers(0, 8).map(lambda eighths: eighths / 8)  # without rounding

quickly = settings(max_examples=60, deadline=None)


def each(function: object, masks: np.ndarray, *args: object, **settings: object) -> np.ndarray:
    return np.stack([function(mask, *args, **settings) for mask in masks])  # type: ignore[operator]


def grid(text: str) -> Tensor:
    """A mask drawn with # and dots."""
    return torch.tensor([[character == "#" for character in line] for line in text.split()])[None]


def highest_indices(mask: np.ndarray, structure: np.ndarray) -> np.ndarray:
    """Each component's highest index, by scipy."""
    found, count = ndimage.label(mask, structure)
    labels = np.full(mask.size, OUTSIDE)
    for component in range(1, count + 1):
        tokens = np.flatnonzero(found == component)
        labels[tokens] = tokens.max()
    return labels


@quickly
@given(MASKS, st.booleans())
def test_components_are_those_of_scipy(masks: np.ndarray, diagonal: bool) -> None:
    labels = components(torch.from_numpy(masks), diagonal=diagonal)
    assert np.array_equal(labels, each(highest_indices, masks, SQUARE if diagonal else CROSS))


def test_a_long_and_winding_component_is_one() -> None:
    """A snake of 33 lines: each of its tokens is far from most others."""
    snake = np.zeros((1, 65, 64), bool)
    snake[:, ::2] = True
    snake[:, 1::4, -1] = snake[:, 3::4, 0] = True
    labels = components(torch.from_numpy(snake))
    assert set(labels[0].tolist()) == {OUTSIDE, 65 * 64 - 1}
    assert np.array_equal(labels, each(highest_indices, snake, SQUARE))


@quickly
@given(MASKS, st.integers(0, 4))
def test_dilation_is_scipys(masks: np.ndarray, by: int) -> None:
    expected = each(ndimage.binary_dilation, masks, np.ones((2 * by + 1,) * 2, bool))
    assert np.array_equal(dilate(torch.from_numpy(masks), by), expected)


@quickly
@given(MASKS, st.integers(0, 4))
def test_closing_is_scipys_and_the_edge_erodes_nothing(masks: np.ndarray, by: int) -> None:
    square = np.ones((2 * by + 1,) * 2, bool)
    expected = each(ndimage.binary_erosion, each(ndimage.binary_dilation, masks, square), square, border_value=1)
    closed = close(torch.from_numpy(masks), by)
    assert np.array_equal(closed, expected)
    assert not (torch.from_numpy(masks) & ~closed).any()


@quickly
@given(MASKS)
def test_holes_are_filled_as_by_scipy(masks: np.ndarray) -> None:
    assert np.array_equal(fill_holes(torch.from_numpy(masks)), each(ndimage.binary_fill_holes, masks))


@pytest.mark.parametrize("flips", [(), (1,), (2,), (1, 2)], ids=["top left", "bottom left", "top right", "bottom right"])
def test_a_mask_in_a_corner_does_not_swallow_the_background(flips: tuple[int, ...]) -> None:
    """A flood fill from pixel (0, 0) would take the mask for the background, and the background for a hole."""
    corner = grid("###.. #.#.. ###.. ..... .....").flip(flips)
    filled = grid("###.. ###.. ###.. ..... .....").flip(flips)
    assert torch.equal(fill_holes(corner), filled)
    assert torch.equal(clean(corner, torch.ones(corner.shape)), filled)


def literally_largest(mask: np.ndarray, weight: np.ndarray, least: float, cover: float, count: int | None) -> np.ndarray:
    found, components = ndimage.label(mask, SQUARE)
    parts = [found == component for component in range(1, components + 1)]
    parts = [part for part in parts if part.sum() >= least * mask.size]
    kept = np.zeros_like(mask)
    for taken, part in enumerate(sorted(parts, key=lambda part: -weight[part].sum())):
        if kept.sum() >= cover * mask.size or taken == count:
            break
        kept |= part
    return kept


@quickly
@given(MASKS, st.integers(0, 99), EIGHTHS, EIGHTHS, st.none() | st.integers(1, 3))
def test_the_weightiest_components_are_kept(masks: np.ndarray, seed: int, least: float, cover: float, count: int | None) -> None:
    weights = np.random.default_rng(seed).random(masks.shape)
    kept = largest(torch.from_numpy(masks), torch.from_numpy(weights), least=least, cover=cover, count=count)
    expected = [literally_largest(mask, weight, least, cover, count) for mask, weight in zip(masks, weights, strict=True)]
    assert np.array_equal(kept, np.stack(expected))


def test_count_cover_and_least() -> None:
    """Three components of 1, 4 and 6 tokens of 36; the smallest is the weightiest."""
    mask = grid("#...## ....## ...... ###... ###... ......")
    weight = torch.ones(mask.shape)
    weight[0, 0, 0] = 9
    one, four, six = (torch.zeros_like(mask) for _ in range(3))
    one[0, 0, 0] = four[0, :2, 4:] = six[0, 3:5, :3] = True
    for chosen, expected in (
        ({}, mask),
        ({"count": 1}, one),
        ({"count": 2}, one | six),
        ({"cover": 1 / 36}, one),
        ({"cover": 2 / 36}, one | six),  # reached in the middle of a component, which is kept whole
        ({"cover": 0.0}, torch.zeros_like(mask)),
        ({"least": 2 / 36}, four | six),
        ({"least": 2 / 36, "count": 1}, six),
        ({"least": 0.5}, torch.zeros_like(mask)),
    ):
        assert torch.equal(largest(mask, weight, **chosen), expected), chosen


@quickly
@given(MASKS, st.integers(0, 99))
def test_samples_are_independent(masks: np.ndarray, seed: int) -> None:
    batch, weights = torch.from_numpy(masks), torch.from_numpy(np.random.default_rng(seed).random(masks.shape))
    alone = [clean(mask[None], weight[None], cover=0.3, count=2) for mask, weight in zip(batch, weights, strict=True)]
    assert torch.equal(clean(batch, weights, cover=0.3, count=2), torch.cat(alone))


@quickly
@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_a_box_along_the_grid_is_its_tokens(data: st.DataObject, height: int, width: int) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    expected = torch.zeros(1, height, width, dtype=torch.bool)
    expected[:, top:bottom, left:right] = True
    box = torch.tensor([[left / width, top / height, right / width, bottom / height]])
    assert torch.equal(boxed(box, (height, width)), expected)


def test_a_token_belongs_to_a_box_that_covers_enough_of_it() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.7, 1.0], [0.0, 0.0, 0.6, 1.0], [0.3, 0.3, 0.4, 0.4], [0.45, 0.0, 0.6, 0.1]])
    assert torch.equal(boxed(boxes[:1], (2, 2), share=0.3), grid("## ##"))
    assert torch.equal(boxed(boxes[1:2], (2, 2), share=0.3), grid("#. #."))
    assert torch.equal(boxed(boxes[2:3], (2, 2)), grid("#. ..")), "too small for any token, it gets the one it is in"
    assert torch.equal(boxed(boxes[3:], (2, 2)), grid(".# .."))
    assert torch.equal(boxed(boxes, (5, 3)), torch.cat([boxed(box[None], (5, 3)) for box in boxes]))


@quickly
@given(MASKS, st.integers(0, 99))
def test_intersection_over_union(masks: np.ndarray, seed: int) -> None:
    others = np.random.default_rng(seed).random(masks.shape) < 0.5
    expected = [(a & b).sum() / (a | b).sum() if (a | b).any() else 1.0 for a, b in zip(masks, others, strict=True)]
    assert iou(torch.from_numpy(masks), torch.from_numpy(others)).tolist() == pytest.approx(expected)
    assert torch.equal(iou(torch.from_numpy(masks), torch.from_numpy(masks)), torch.ones(len(masks)))
