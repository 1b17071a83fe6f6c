"""Masks over a grid of image tokens: cleaned up on the device they are on, for any grid, batched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

OUTSIDE = -1
"""The label of tokens outside a mask."""


def dilate(mask: Tensor, by: int = 1) -> Tensor:
    """Grows masks [batch, height, width] by some tokens, diagonals included."""
    if by == 0:
        return mask
    return max_pool2d(mask[:, None].float(), 2 * by + 1, stride=1, padding=by)[:, 0] > 0


def close(mask: Tensor, by: int = 1) -> Tensor:
    """Dilation, then erosion: bridges gaps of up to `2 * by` tokens. What lies beyond the edge erodes nothing."""
    return ~dilate(~dilate(mask, by), by)


def components(mask: Tensor, *, diagonal: bool = True) -> Tensor:
    """Labels connected components, [batch, height * width]: each token's label is the highest index in its component, -1 outside.

    Labels hook onto the best neighbouring label and then jump to that label's own, so long and winding components take a logarithmic
    number of rounds rather than one per token.
    """
    batch, height, width = mask.shape
    inside = mask.flatten(1)
    index = torch.arange(height * width, device=mask.device).expand(batch, -1)
    labels = torch.where(inside, index, OUTSIDE)
    while True:
        best = torch.where(inside, _highest_neighbour(labels.view(batch, height, width), diagonal).flatten(1), OUTSIDE)
        parents = torch.where(inside, labels, index)
        hooked = torch.maximum(best, labels.scatter_reduce(1, parents, best, "amax"))
        jumped = torch.where(inside, hooked.gather(1, hooked.clamp_min(0)), OUTSIDE)
        if torch.equal(jumped, labels):
            return labels
        labels = jumped


def _highest_neighbour(labels: Tensor, diagonal: bool) -> Tensor:
    """The highest label among each token and its neighbours, [batch, height, width]."""
    values = labels.double()  # exact up to 2^53 tokens
    if diagonal:
        return max_pool2d(values[:, None], 3, stride=1, padding=1)[:, 0].long()
    rows = max_pool2d(values[:, None], (3, 1), stride=1, padding=(1, 0))
    columns = max_pool2d(values[:, None], (1, 3), stride=1, padding=(0, 1))
    return torch.maximum(rows, columns)[:, 0].long()


def fill_holes(mask: Tensor) -> Tensor:
    """Adds what a mask encloses. Outside is what reaches the edge, wherever: no corner is assumed to be background."""
    batch, height, width = mask.shape
    framed = pad(~mask, (1, 1, 1, 1), value=True)  # a frame joins everything outside into one component
    labels = components(framed, diagonal=False).view(batch, height + 2, width + 2)
    outside = labels == labels[:, -1:, -1:]
    return ~outside[:, 1:-1, 1:-1]


def largest(mask: Tensor, weight: Tensor, *, least: float = 0.0, cover: float = 1.0, count: int | None = None) -> Tensor:
    """Keeps the weightiest components.

    Args:
        mask: [batch, height, width].
        weight: of each token, [batch, height, width], not negative.
        least: components smaller than this share of the grid are dropped.
        cover: components are taken, the weightiest first, until this share of the grid is covered.
        count: at most so many.
    """
    labels = components(mask)
    tokens = labels.shape[1]
    slots = labels.clamp_min(0)
    inside = (labels >= 0).float()
    area = torch.zeros_like(inside).scatter_add(1, slots, inside)  # [batch, tokens], at each component's label
    mass = torch.zeros_like(inside).scatter_add(1, slots, weight.flatten(1).float() * inside)
    mass = torch.where(area >= max(least * tokens, 1), mass, -1.0)
    order = mass.argsort(dim=1, descending=True, stable=True)
    sorted_area = area.gather(1, order)
    before = sorted_area.cumsum(1) - sorted_area
    kept = (mass.gather(1, order) >= 0) & (before < cover * tokens)
    if count is not None:
        kept[:, count:] = False
    chosen = torch.zeros_like(kept).scatter(1, order, kept)
    return (chosen.gather(1, slots) & (labels >= 0)).view(mask.shape)


def clean(mask: Tensor, weight: Tensor, *, least: float = 0.0, cover: float = 1.0, count: int | None = None) -> Tensor:
    """Closes gaps, fills holes, and keeps the weightiest components; shapes and arguments as in `largest`."""
    return largest(fill_holes(close(mask)), weight, least=least, cover=cover, count=count)


def boxed(boxes: Tensor, grid: tuple[int, int], *, share: float = 0.5) -> Tensor:
    """Boxes (left, top, right, bottom) in shares of the image, [batch, 4], as masks [batch, height, width].

    A token belongs to a box that covers at least `share` of it; a box too small for that gets the tokens it covers most.
    """
    height, width = grid
    x = _overlaps(boxes[:, 0], boxes[:, 2], width)
    y = _overlaps(boxes[:, 1], boxes[:, 3], height)
    covered = y[:, :, None] * x[:, None, :]
    needed = covered.amax(dim=(1, 2), keepdim=True).clamp(max=share, min=1e-6)
    return covered >= needed


def _overlaps(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Which share of each cell an interval covers, [batch, cells]."""
    edges = torch.linspace(0, 1, cells + 1, device=low.device)
    return ((torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])) * cells).clamp(0, 1)


def resize(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks [batch, height, width] on another grid that shows the same picture: a token is in it if any part of it is."""
    if tuple(mask.shape[1:]) == grid:
        return mask
    edges = [torch.linspace(0, 1, cells + 1) for cells in mask.shape[1:]]
    rows, columns = (
        (_overlaps(edge[:-1], edge[1:], cells) > 1e-6).float().to(mask.device) for edge, cells in zip(edges, grid, strict=True)
    )
    return rows.T @ mask.float() @ columns > 0


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of masks [batch, height, width]; 1 where both are empty, [batch]."""
    union = (first | second).flatten(1).sum(1)
    return torch.where(union > 0, (first & second).flatten(1).sum(1) / union.clamp_min(1), 1.0)


def over_latents(masks: Tensor, latents: Tensor) -> Tensor:
    """Masks over image tokens [batch, height, width] as masks that broadcast with latents, packed or not."""
    if latents.ndim == 3:
        return masks.flatten(1)[..., None]
    rows, columns = latents.shape[-2] // masks.shape[-2], latents.shape[-1] // masks.shape[-1]
    return masks.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, None]
