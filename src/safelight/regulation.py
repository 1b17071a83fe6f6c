"""Regulated attention: λ(i, j), how much of what query i draws from key j is let through. No attention matrix is ever made.

For each group of queries that share their factors, scaling a column of the probabilities equals scaling that row of V; with
renormalisation it equals adding log λ to the logits. Either way one fused attention call per group is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .flow import Heads

Attend = Callable[[Heads], Tensor]


@dataclass(frozen=True)
class Group:
    """Queries that see the keys through the same factors."""

    queries: slice | Tensor
    """A stretch of tokens, or each sample's own tokens [batch, chosen]."""
    factors: Tensor | None
    """λ of each key, [batch, keys]; None: 1."""
    valid: Tensor | None = None
    """Which of a sample's own tokens count, [batch, chosen]; the others are padding."""
    keys: slice | None = None
    """The keys that are seen at all: with renormalisation, leaving keys out is the same as λ = 0, and cheaper."""


def regulate(heads: Heads, groups: Iterable[Group], attend: Attend, base: Callable[[], Tensor], *, renormalise: bool) -> Tensor:
    """Attention under λ, [batch, heads, queries, width].

    Args:
        heads: query, key and value.
        groups: later ones overrule earlier ones; queries in none of them are left as they are.
        attend: plain attention.
        base: the result for all queries with λ = 1; asked for only if some queries are in no group.
        renormalise: whether each query's weights sum to one again (UVR's unified rule), or not (its published code).
    """
    groups = list(groups)
    tokens = heads.query.shape[2]
    stretches = sorted(g.queries.indices(tokens)[:2] for g in groups if isinstance(g.queries, slice))
    covered = all(end == start for (_, end), (start, _) in zip([(0, 0), *stretches], [*stretches, (tokens, tokens)], strict=True))
    result = torch.empty_like(heads.query) if covered else base().clone()
    for group in groups:
        if isinstance(group.queries, slice):
            result[:, :, group.queries] = attend(_through(replace(heads, query=heads.query[:, :, group.queries]), group, renormalise))
            continue
        index = group.queries[:, None, :, None].expand(-1, heads.query.shape[1], -1, heads.query.shape[3])
        seen = attend(_through(replace(heads, query=heads.query.gather(2, index)), group, renormalise))
        if group.valid is not None:
            seen = torch.where(group.valid[:, None, :, None], seen, result.gather(2, index))
        # In place where nobody wants a gradient (an attack does): a copy for each group would cost memory.
        result = result.scatter(2, index, seen) if torch.is_grad_enabled() else result.scatter_(2, index, seen)
    return result


def _through(heads: Heads, group: Group, renormalise: bool) -> Heads:
    if group.keys is not None:
        heads = replace(heads, key=heads.key[:, :, group.keys], value=heads.value[:, :, group.keys])
    if group.factors is None:
        return heads
    factors = group.factors if group.keys is None else group.factors[:, group.keys]
    if renormalise:
        return replace(heads, bias=factors.log()[:, None, None, :])
    return replace(heads, value=heads.value * factors[:, None, :, None].to(heads.value.dtype))
