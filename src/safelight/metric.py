"""A learned metric in closed form: distances that follow what separates the classes rather than what the texts are about."""

from __future__ import annotations

import torch
from torch import Tensor


def discriminant(embeddings: Tensor, labels: Tensor, shrinkage: float | None = None) -> Tensor:
    """Regularised linear discriminant analysis with equal class weights.

    Args:
        embeddings: [entries, width].
        labels: [entries], 0 … classes - 1, each at least once.
        shrinkage: how far the within-class covariance is drawn to a multiple of the identity, 0 … 1. None: as far as
            Ledoit & Wolf (2004) find best. The more noisy the labels, the larger it should be.

    Returns:
        A projection [width, dims], dims < classes, after which the classes' spread is about 1 in every direction.

    Raises:
        ValueError: if there is one class only, or the classes have the same means.
    """
    classes = int(labels.max()) + 1
    if classes < 2 or len(set(labels.tolist())) < classes:
        raise ValueError("a discriminant metric needs safe and unsafe prompts, and at least one prompt of each category")
    exact = embeddings.double()
    means = torch.stack([exact[labels == index].mean(dim=0) for index in range(classes)])  # [classes, width]
    values, vectors = torch.linalg.eigh(shrunk_covariance(exact - means[labels], shrinkage))
    whiten = vectors * values.clamp_min(values.max() * 1e-8 + 1e-12).rsqrt()  # [width, width]
    _, spread, directions = torch.linalg.svd((means - means.mean(dim=0)) @ whiten, full_matrices=False)
    kept = spread > 1e-6 * spread.max()  # the means' own mean is subtracted: at least one direction is empty
    if not bool(spread.max() > 1e-9):
        raise ValueError("safe and unsafe prompts have the same mean embedding; a discriminant metric can't tell them apart")
    return (whiten @ directions[kept].T).float()


def shrunk_covariance(residuals: Tensor, shrinkage: float | None = None) -> Tensor:
    """The covariance of centred rows [entries, width], drawn to a multiple of the identity."""
    entries, width = residuals.shape
    covariance = residuals.T @ residuals / entries
    target = covariance.trace() / width * torch.eye(width, dtype=residuals.dtype)
    if shrinkage is None:
        noise = (residuals.square().sum(dim=1).square().sum() / entries - covariance.square().sum()) / entries
        shrinkage = float((noise / (covariance - target).square().sum().clamp_min(1e-30)).clamp(0, 1))
    return (1 - shrinkage) * covariance + shrinkage * target


def squared_distances(queries: Tensor, entries: Tensor) -> Tensor:
    """[batch, dims], [entries, dims] -> [batch, entries]."""
    cross = queries @ entries.T
    return torch.clamp(queries.square().sum(dim=1)[:, None] - 2 * cross + entries.square().sum(dim=1), min=0)
