"""Where to steer: positions and operators are scored before any dictionary is trained."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..dictionary import Operator
from ..site import Site


@dataclass(frozen=True)
class Weights:
    """R = semantics · S_sem + binding · S_bind + stability · S_stab - cost · C."""

    semantics: float = 0.25
    binding: float = 0.35
    stability: float = 0.25
    cost: float = 0.15

    def vary(self, share: float) -> list[Weights]:
        """Every combination of weights that are larger, smaller or as they are by a share."""
        factors = itertools.product((1 - share, 1.0, 1 + share), repeat=4)
        return [Weights(*(value * factor for value, factor in zip(vars(self).values(), row, strict=True))) for row in factors]


@dataclass(frozen=True)
class Contrasts:
    """What the scores are computed from; small enough to keep."""

    shifts: Mapping[str, Tensor]
    """Site -> a_safe - a_unsafe, averaged over tokens, [pairs, times, width]."""
    categories: Tensor
    """[pairs], of int."""
    outcomes: Tensor
    """Difference of the final latents, [pairs, size]."""
    updates: Mapping[str, Tensor]
    """Site|operator -> relative update norm of the proxy operator, [prompts of source and target, times]."""
    benign: Mapping[str, Tensor]
    """Site|operator -> the same on benign prompts."""
    flops: Mapping[str, float]
    """Site -> what a dictionary there adds, as a share of the denoiser's."""

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        tensors = {"categories": self.categories, "outcomes": self.outcomes}
        for name in ("shifts", "updates", "benign"):
            tensors |= {f"{name}/{key}": value for key, value in getattr(self, name).items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"flops": json.dumps(dict(self.flops))})

    @classmethod
    def load(cls, path: Path) -> Contrasts:
        """Reads it back."""
        with safe_open(path, "pt") as file:
            flops = json.loads((file.metadata() or {})["flops"])
        tensors = load_file(path)
        groups: dict[str, dict[str, Tensor]] = {"shifts": {}, "updates": {}, "benign": {}}
        for key, value in tensors.items():
            name, _, rest = key.partition("/")
            if rest:
                groups[name][rest] = value
        return cls(groups["shifts"], tensors["categories"], tensors["outcomes"], groups["updates"], groups["benign"], flops)


class Proxy:
    """A difference-of-means operator, in place of a dictionary that isn't trained yet."""

    def __init__(self, unsafe: Tensor, safe: Tensor) -> None:
        """From activations [pairs, times, tokens, width] of both members."""
        means = [member.float().mean(dim=(0, 2)) for member in (unsafe, safe)]
        self.safe, self.shift = means[1], means[1] - means[0]  # [times, width]

    def updates(self, tokens: Tensor, operator: Operator) -> Tensor:
        """‖change‖ / ‖activations‖ of each picture and step, [pictures, times], for tokens [pictures, times, tokens, width].

        Blend moves a token along the difference of means by its distance from the safe mean, both ways; Repel takes away only what
        points to the unsafe mean.
        """
        tokens = tokens.float()
        direction = normalize(self.shift, dim=-1)[:, None]
        along = ((tokens - self.safe[:, None]) * direction).sum(-1)
        change = along if operator == "blend" else along.clamp_max(0)
        return change.norm(dim=-1) / tokens.flatten(2).norm(dim=-1).clamp_min(1e-12)


@dataclass(frozen=True)
class Candidate:
    """A position with an operator, and its scores."""

    site: str
    group: str
    operator: Operator
    semantics: float
    binding: float
    stability: float
    cost: float

    def score(self, weights: Weights) -> float:
        """R."""
        return (
            weights.semantics * self.semantics
            + weights.binding * self.binding
            + weights.stability * self.stability
            - weights.cost * self.cost
        )


@dataclass(frozen=True)
class Routing:
    """All candidates, and those that were chosen."""

    candidates: Sequence[Candidate]
    chosen: Sequence[Candidate]
    weights: Weights
    steady: float
    """The share of weights varied by ±20 % under which the same positions are chosen."""

    def rows(self) -> list[dict[str, Any]]:
        """The table, best first."""
        ranked = sorted(self.candidates, key=lambda candidate: -candidate.score(self.weights))
        return [vars(one) | {"score": one.score(self.weights), "chosen": one in self.chosen} for one in ranked]


def group_of(site: str, joint: int, single: int) -> str:
    """text, binding or rendering; where there are no single blocks, the last third of the joint ones renders."""
    parsed = Site.parse(site)
    if parsed.block == "prompt" or parsed.stream == "text":
        return "text"
    if parsed.block == "single" or (single == 0 and parsed.index is not None and 3 * parsed.index >= 2 * joint):
        return "rendering"
    return "binding"


def route(contrasts: Contrasts, groups: Mapping[str, str], weights: Weights | None = None, positions: int = 2) -> Routing:
    """Scores every site with every operator, and chooses at most one of a group.

    Args:
        contrasts: from recorded pairs.
        groups: site -> its group.
        weights: of the scores.
        positions: how many to choose, 1 or 2.

    Raises:
        ValueError: if a site's activations do not differ between the members of any pair.
    """
    weights = weights or Weights()
    for site, shift in contrasts.shifts.items():
        if not bool(shift.abs().any()):
            raise ValueError(f"the members of the pairs have the same activations at '{site}'; give pairs that differ in what is unsafe")
    keys = [(site, operator) for site in contrasts.shifts for operator in get_args(Operator)]
    raw = torch.tensor([_raw(contrasts, site, operator) for site, operator in keys], dtype=torch.float64)
    low, high = raw.amin(0), raw.amax(0)
    scaled = (raw - low) / (high - low).clamp_min(1e-12)
    candidates = [
        Candidate(site, groups[site], operator, *map(float, row)) for (site, operator), row in zip(keys, scaled, strict=True)
    ]  # fmt: skip
    chosen = choose(candidates, weights, positions)
    places = {one.site for one in chosen}
    same = [{one.site for one in choose(candidates, varied, positions)} == places for varied in weights.vary(0.2)]
    return Routing(candidates, chosen, weights, sum(same) / len(same))


def choose(candidates: Sequence[Candidate], weights: Weights, positions: int) -> list[Candidate]:
    """The best of each group, best first."""
    best: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda one: -one.score(weights)):
        best.setdefault(candidate.group, candidate)
    return list(best.values())[:positions]


def _raw(contrasts: Contrasts, site: str, operator: Operator) -> tuple[float, float, float, float]:
    shift = contrasts.shifts[site].float()
    key = f"{site}|{operator}"
    return (
        semantics(shift.mean(1), contrasts.categories),
        linear_cka(shift.flatten(1), contrasts.outcomes.float()),
        stability(contrasts.updates[key]),
        float(contrasts.benign[key].mean()) + contrasts.flops[site],
    )


def semantics(shifts: Tensor, categories: Tensor) -> float:
    """S_sem: mean cosine of held-out Δa [pairs, width] to its own category's prototype, minus that to the others'."""
    kinds = categories.unique().tolist()
    held_out = torch.arange(len(shifts)) % 2 == 1
    fitted = {kind: shifts[(categories == kind) & ~held_out] for kind in kinds}
    prototypes = {kind: rows.mean(0) for kind, rows in fitted.items() if len(rows)}
    scores = []
    for shift, kind in zip(shifts[held_out], categories[held_out].tolist(), strict=True):
        if kind in prototypes:
            others = [float(cosine_similarity(shift, prototype, dim=0)) for other, prototype in prototypes.items() if other != kind]
            scores.append(float(cosine_similarity(shift, prototypes[kind], dim=0)) - (sum(others) / len(others) if others else 0.0))
    return sum(scores) / max(1, len(scores))


def linear_cka(first: Tensor, second: Tensor) -> float:
    """S_bind: linear CKA of [pairs, width] and [pairs, size], 0..1 (Kornblith et al., 2019, https://arxiv.org/abs/1905.00414)."""
    grams = [(x - x.mean(0)) @ (x - x.mean(0)).T for x in (first.double(), second.double())]
    norms = [gram.norm() for gram in grams]
    return float((grams[0] * grams[1]).sum() / (norms[0] * norms[1]).clamp_min(1e-24))


def stability(updates: Tensor) -> float:
    """S_stab = 1 - Var(r) / (Var(r) + Mean(r)²) of relative update norms r, over prompts and steps."""
    variance, mean = updates.double().var(), updates.double().mean()
    return float(1 - variance / (variance + mean.square()).clamp_min(1e-24))


def plot(routing: Routing, file: Path) -> None:
    """Draws the table."""
    with suppress(ImportError):  # plots are an extra
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        rows = routing.rows()
        figure, axis = pyplot.subplots(figsize=(7, 0.3 * len(rows) + 1))
        labels = [f"{row['site']} {row['operator']}" for row in rows]
        left = torch.zeros(len(rows))
        for name in ("semantics", "binding", "stability"):
            part = torch.tensor([getattr(routing.weights, name) * row[name] for row in rows])
            axis.barh(labels, part, left=left, label=name)
            left = left + part
        axis.barh(labels, [-routing.weights.cost * row["cost"] for row in rows], label="cost")
        axis.plot([row["score"] for row in rows], labels, "k|", markersize=10, label="R")
        axis.invert_yaxis()
        axis.legend(fontsize=7)
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row["chosen"] else "normal")
        figure.tight_layout()
        figure.savefig(file, dpi=110)
        pyplot.close(figure)
