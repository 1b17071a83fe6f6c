"""Subspaces spanned by embeddings: bases, distances to them, projections onto them and out of them."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Directions whose singular value is a smaller share of the largest one are rounding, and left out."""


def basis(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the span of some vectors [count, width], in single precision, [rank, width]."""
    _, sizes, directions = torch.linalg.svd(vectors.float(), full_matrices=False)
    return directions[sizes > TOLERANCE * sizes.max().clamp_min(1e-12)]


def onto(space: Tensor, vectors: Tensor) -> Tensor:
    """The parts of vectors [..., width] that lie in the span of an orthonormal basis [rank, width]."""
    return (vectors @ space.T) @ space


def out_of(space: Tensor, vectors: Tensor) -> Tensor:
    """The parts of vectors [..., width] that are orthogonal to the span of an orthonormal basis [rank, width]."""
    return vectors - onto(space, vectors)


def standing_out(distances: Tensor, margin: float, whole: float) -> Tensor:
    """Which distances [count] exceed the mean of the others by more than a share `margin`; a single one is compared with `whole`."""
    count = len(distances)
    others = (distances.sum() - distances) / (count - 1) if count > 1 else torch.full_like(distances, whole)
    return distances > (1 + margin) * others
