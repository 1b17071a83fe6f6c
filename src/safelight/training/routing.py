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

PICTURES = 16
"""So many pictures' activations are in single precision at a time."""


@dataclass(frozen=True)
class Weights:
    """R = semantics · S_sem + fit · S_fit + stability · S_stab - cost · C.

    S_fit stands in the place of the paper's S_bind, with its weight: the share of held-out contrasts that a proxy operator makes (for Blend
    a ridge regression's R²) instead of a CKA. It was chosen after seeing which position steers best on the testbed. The paper's scores, and
    its scaling of each to the candidates' range, can't be switched back on.
    """

    semantics: float = 0.25
    fit: float = 0.35
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
    """Site -> a_safe - a_unsafe, averaged over tokens by how much they differ, [pairs, times, width]."""
    categories: Tensor
    """[pairs], of int."""
    foretold: Mapping[str, float]
    """Site|operator -> the share of held-out a_safe - a_unsafe that the proxy operator makes."""
    updates: Mapping[str, Tensor]
    """Site|operator -> relative norm of what the proxy operator changes, [prompts of source and target, times]."""
    benign: Mapping[str, Tensor]
    """Site|operator -> the same on benign prompts."""
    flops: Mapping[str, float]
    """Site -> what a dictionary there adds, as a share of the denoiser's."""

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        tensors = {"categories": self.categories}
        for name in ("shifts", "updates", "benign"):
            tensors |= {f"{name}/{key}": value for key, value in getattr(self, name).items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, self._metadata())

    def _metadata(self) -> dict[str, str]:
        return {"flops": json.dumps(dict(self.flops)), "foretold": json.dumps(dict(self.foretold))}

    @classmethod
    def load(cls, path: Path) -> Contrasts:
        """Reads it back."""
        with safe_open(path, "pt") as file:
            known = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        tensors = load_file(path)
        groups: dict[str, dict[str, Tensor]] = {"shifts": {}, "updates": {}, "benign": {}}
        for key, value in tensors.items():
            name, _, rest = key.partition("/")
            if rest:
                groups[name][rest] = value
        return cls(groups["shifts"], tensors["categories"], known["foretold"], groups["updates"], groups["benign"], known["flops"])


class Proxy:
    """What operators would do at a site, before there is a dictionary.

    Blend: the affine map that best foretells from an unsafe token what is to be added to it, and nothing for safe ones (ridge regression).
    Repel: the part of a token that points from the safe to the unsafe mean is taken away. Both are fitted on every other pair.
    """

    def __init__(self, unsafe: Tensor, safe: Tensor, ridge: float = 0.01) -> None:
        """From activations [pairs, times, tokens, width] of both members."""
        means = [member[::2].float().mean(dim=(0, 2)) for member in (unsafe, safe)]
        self.safe, self.shift = means[1], means[1] - means[0]  # [times, width]
        self.middle, self.offset = (means[0] + means[1]).mean(0) / 2, self.shift.mean(0) / 2
        covariance, cross = (torch.zeros(unsafe.shape[-1], unsafe.shape[-1], dtype=torch.float64) for _ in range(2))
        for own, twin in zip(unsafe[::2].split(PICTURES), safe[::2].split(PICTURES), strict=True):
            first, second = ((member.float() - self.middle).flatten(0, 2) for member in (own, twin))
            covariance += first.T @ first + second.T @ second
            cross += first.T @ (second - first)
        covariance += ridge * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance), dtype=torch.float64)
        self.map = torch.linalg.solve(covariance, cross).float()

    def change(self, tokens: Tensor, operator: Operator) -> Tensor:
        """What is added to tokens [pictures, times, tokens, width]."""
        if operator == "blend":
            return (tokens.float() - self.middle) @ self.map + self.offset
        direction = normalize(self.shift, dim=-1)[:, None]
        return -((tokens.float() - self.safe[:, None]) * direction).sum(-1, keepdim=True).clamp_max(0) * direction

    def updates(self, tokens: Tensor, operator: Operator) -> Tensor:
        """‖change‖ / ‖activations‖ of each picture and step, [pictures, times], for tokens [pictures, times, tokens, width]."""
        norms = [
            (self.change(part, operator).flatten(2).norm(dim=-1), part.float().flatten(2).norm(dim=-1)) for part in tokens.split(PICTURES)
        ]  # fmt: skip
        return torch.cat([change / own.clamp_min(1e-12) for change, own in norms])

    def foretold(self, unsafe: Tensor, safe: Tensor, operator: Operator) -> float:
        """1 - ‖Δa - change‖² / ‖Δa‖² on the pairs that it wasn't fitted on: 1 if the change is what is needed, 0 if none is as good."""
        missed, wanted = 0.0, 0.0
        for own, twin in zip(unsafe[1::2].split(PICTURES), safe[1::2].split(PICTURES), strict=True):
            shift = twin.float() - own.float()
            missed += float((shift - self.change(own, operator)).square().sum())
            wanted += float(shift.square().sum())
        return 1 - missed / max(wanted, 1e-12)


@dataclass(frozen=True)
class Candidate:
    """A position with an operator, and its scores."""

    site: str
    group: str
    operator: Operator
    semantics: float
    fit: float
    stability: float
    cost: float

    def score(self, weights: Weights) -> float:
        """R."""
        return weights.semantics * self.semantics + weights.fit * self.fit + weights.stability * self.stability - weights.cost * self.cost


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

    Scores are shares, and are not scaled further: between the least and the greatest of the candidates, small differences would weigh as
    much as large ones, and a candidate that nobody chooses would reorder the others.

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
    candidates = [Candidate(site, groups[site], operator, *_scores(contrasts, site, operator)) for site, operator in keys]
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


def _scores(contrasts: Contrasts, site: str, operator: Operator) -> tuple[float, float, float, float]:
    shift = contrasts.shifts[site].float()
    key = f"{site}|{operator}"
    return (
        semantics(shift.mean(1), contrasts.categories),
        contrasts.foretold[key],
        stability(contrasts.updates[key]),
        float(contrasts.benign[key].mean()) + contrasts.flops[site],
    )


def pooled(unsafe: Tensor, safe: Tensor) -> Tensor:
    """Δa [pairs, times, width] of activations [pairs, times, tokens, width]: tokens count by how much they differ."""
    parts = []
    for own, twin in zip(unsafe.split(PICTURES), safe.split(PICTURES), strict=True):
        shift = twin.float() - own.float()
        weight = shift.square().sum(-1, keepdim=True)
        parts.append((weight * shift).sum(2) / weight.sum(2).clamp_min(1e-12))
    return torch.cat(parts)


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
        for name in ("semantics", "fit", "stability"):
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
