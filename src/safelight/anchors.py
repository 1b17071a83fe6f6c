"""Anchors: what an unsafe concept looks like inside a denoiser, as directions that image tokens are compared with."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from .backbone import Backbone
from .calibration import Calibration
from .errors import ArtefactError
from .files import read_tensors, write_tensors
from .site import Layout, Site

FORMAT = "safelight-anchors/1"
REMEDY = "collect new ones with `safelight train uvr`"
Kind = Literal["raw", "cosine", "whitened"]
SAMPLED = 64
"""How many entries of the probe's weights identify a checkpoint."""
SAME_WEIGHTS = 0.999
"""Their cosine, at least, between a checkpoint and itself in another precision."""
NEAR = 2.0
"""How far from its nearest moment a look may be, in spacings of the moments."""
ALONE = 0.05
"""The spacing of anchors of a single moment."""


@dataclass(frozen=True)
class Anchors:
    """One direction per moment and concept (or several: clusters), in the space of a probe's attention outputs.

    The likeness of a token to K anchors is linear in them, so that they collapse exactly into their mean (UVR, Sec. "Anchors").
    """

    weights: Tensor
    """[moments, concepts, clusters, width], where width is that of all heads together."""
    bias: Tensor
    """[moments, concepts, clusters], added to the likeness: what whitening asks for, and what puts the moments' scores on one scale."""
    moments: tuple[float, ...]
    """How much of the noise schedule was done when each moment's anchors were collected."""
    concepts: tuple[str, ...]
    thresholds: tuple[float, ...]
    """τ of each concept: a token above it sets the guard off."""
    levels: tuple[float, ...]
    """For each concept, the score above which a token belongs to the mask once the guard was set off; at most τ."""
    site: str
    """The probe: an attention's output, e.g. `single.10.attention:image`."""
    heads: int
    kind: Kind = "whitened"
    smooth: bool = True
    """Whether scores are averaged over 3 x 3 tokens."""
    model: Mapping[str, Any] | None = None
    """The fingerprint of the denoiser that they were collected from (see `fingerprint`)."""
    calibration: Calibration | None = None

    def scores(self, tokens: Tensor, progress: float, grid: tuple[int, int]) -> Tensor:
        """How much each token looks like each concept.

        Args:
            tokens: attention outputs [batch, tokens, width].
            progress: how much of the noise schedule is done; the nearest moment's anchors are used.
            grid: rows and columns of the image tokens.

        Returns:
            [batch, concepts, height, width]

        Raises:
            ArtefactError: if no moment is near (see `moment`).
        """
        moment = self.moment(progress)
        weights = self.weights[moment].to(tokens)
        if self.kind == "cosine":
            tokens, weights = normalize(tokens, dim=-1), normalize(weights, dim=-1)
        likeness = (tokens @ weights.flatten(0, 1).T).transpose(1, 2).float()  # [batch, concepts * clusters, tokens]
        if self.kind == "raw":
            likeness = likeness / self.raw_scale  # mean over heads, by the square root of a head's width
        likeness = likeness.unflatten(1, weights.shape[:2]) + self.bias[moment].to(likeness)[..., None]
        maps = likeness.amax(dim=2).unflatten(-1, grid)
        return avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False) if self.smooth and min(grid) > 1 else maps

    def moment(self, progress: float) -> int:
        """The moment that is nearest to where a generation is in the noise schedule.

        Raises:
            ArtefactError: if that is further off than `reach`: at another noise level, scores mean nothing.
        """
        nearest = min(range(len(self.moments)), key=lambda i: abs(self.moments[i] - progress))
        if abs(self.moments[nearest] - progress) > self.reach:
            raise ArtefactError(
                f"these anchors at '{self.site}' were collected between {min(self.moments):.0%} and {max(self.moments):.0%} of the noise "
                f"schedule, and are to look at {progress:.0%} of it (image to image begins late); "
                "collect in every step, with `safelight train uvr` without --steps, or look less long (uvr.localise, uvr.late)"
            )
        return nearest

    def check_moments(self, skipped: int, total: int, steps: Iterable[int]) -> None:
        """Makes sure that something is known of each of some steps, of so many after those that a generation leaves out.

        Raises:
            ArtefactError: if not.
        """
        for step in steps:
            self.moment((skipped + step) / (skipped + total))

    @property
    def reach(self) -> float:
        """How far from its nearest moment a look may be: twice the widest spacing of the moments."""
        ordered = sorted(self.moments)
        return NEAR * max((after - before for before, after in itertools.pairwise(ordered)), default=ALONE)

    @property
    def width(self) -> int:
        """The width of all heads together."""
        return self.weights.shape[-1]

    @property
    def raw_scale(self) -> float:
        """What divides a raw score: H · √D."""
        return self.heads * math.sqrt(self.width / self.heads)

    def at(self, device: torch.device) -> Anchors:
        """The same on another device."""
        return self if self.weights.device == device else replace(self, weights=self.weights.to(device), bias=self.bias.to(device))

    def only(self, concepts: Sequence[str]) -> Anchors:
        """Some of the concepts.

        Raises:
            ValueError: for one that there isn't.
        """
        for concept in concepts:
            if concept not in self.concepts:
                raise ValueError(f"these anchors have no concept {concept!r}; they have {', '.join(self.concepts)}")
        chosen = [self.concepts.index(concept) for concept in concepts]
        return replace(
            self, weights=self.weights[:, chosen], bias=self.bias[:, chosen], concepts=tuple(concepts),
            thresholds=tuple(self.thresholds[i] for i in chosen), levels=tuple(self.levels[i] for i in chosen),
        )  # fmt: skip

    def check(self, backbone: Backbone, *, transfer: bool = False) -> None:
        """Makes sure that anchors fit a denoiser.

        Args:
            backbone: the denoiser's.
            transfer: whether another checkpoint of the same architecture will do.

        Raises:
            ArtefactError: if they don't.
        """
        check_model(backbone, self.site, self.model, "these anchors were collected from", REMEDY, transfer=transfer)

    def check_tokens(self, tokens: Tensor, layout: Layout) -> None:
        """Makes sure that a probe's output has the anchors' width.

        Raises:
            ArtefactError: if not.
        """
        if tokens.shape[-1] != self.width:
            raise ArtefactError(f"these anchors have width {self.width}, the probe '{self.site}' gives {tokens.shape[-1]}; {REMEDY}")
        assert tokens.shape[1] == getattr(layout, Site.parse(self.site).stream or "image")

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("weights", "bias")}
        write_tensors(path, FORMAT, {"weights": self.weights.float(), "bias": self.bias.float()}, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Anchors:
        """Reads anchors.

        Raises:
            ArtefactError: if the file is missing, damaged, or holds no anchors.
        """
        metadata, tensors = read_tensors(path, "anchors", FORMAT, REMEDY)
        facts = metadata.parsed("facts")
        facts.only([field.name for field in fields(cls) if field.name not in ("weights", "bias")])
        if sorted(tensors) != ["bias", "weights"] or not isinstance(facts.get("smooth"), bool):
            raise facts.error(f"lacks a part of anchors, or has one too many (it has {', '.join(sorted(tensors))})")
        anchors = cls(
            tensors["weights"],
            tensors["bias"], **{name: facts.numbers(name) for name in ("moments", "thresholds", "levels")}, concepts=facts.texts("concepts"),
            site=facts.text("site"), heads=facts.integer("heads", 1, 1 << 16), kind=facts.text("kind"),  # type: ignore[arg-type]
            smooth=facts.get("smooth"), model=None if facts.get("model") is None else facts.mapping("model"), calibration=Calibration.read(facts),
        )  # fmt: skip
        if flaw := anchors._flaw():
            raise ArtefactError(f"{path} {flaw}; {REMEDY}")
        metadata.settle()
        return anchors

    def _flaw(self) -> str | None:
        """What is wrong, if anything."""
        if not (self.weights.is_floating_point() and self.bias.is_floating_point()):
            return "has anchors that are no floating-point numbers"
        try:
            Site.parse(self.site)
        except ValueError as error:
            return f"has a probe that is {error}"
        counts = (len(self.moments), len(self.concepts))
        if self.weights.ndim != 4 or tuple(self.weights.shape[:2]) != counts or self.bias.shape != self.weights.shape[:3]:
            return "has no direction for each moment and concept"
        if not bool(torch.isfinite(self.weights).all()) or not bool(torch.isfinite(self.bias).all()):
            return "contains NaN or infinite anchors"
        if len(self.thresholds) != counts[1] or len(self.levels) != counts[1] or 0 in counts:
            return "has no threshold for each concept"
        if not all(map(math.isfinite, (*self.thresholds, *self.levels, *self.moments))):
            return "has thresholds that are no numbers"
        if self.kind not in get_args(Kind) or not isinstance(self.heads, int) or self.heads < 1 or self.width % self.heads:
            return f"is of an unknown kind {self.kind!r}, or its width {self.width} isn't made of {self.heads} heads"
        return None


def fingerprint(backbone: Backbone, site: str) -> dict[str, Any]:
    """What identifies a denoiser, as far as anchors care: its class, its blocks, and some of the probe's weights."""
    module, _ = backbone.locate(Site.parse(site))
    block = backbone.module.get_submodule(backbone.paths(Site.parse(site).block)[Site.parse(site).index or 0])
    weights = next((weight for name, weight in block.named_parameters() if name.endswith(("to_v.weight", "to_qkv.weight"))), None)
    readable = weights is not None and not weights.is_meta and weights.is_floating_point()
    return {
        "denoiser": type(backbone.module).__name__,
        "blocks": {kind: len(backbone.paths(kind)) for kind in backbone.blocks},
        "heads": heads_of(module, block),
        "weights": sampled(weights) if readable and weights is not None else None,
    }


def check_model(
    backbone: Backbone, site: str, model: Mapping[str, Any] | None, origin: str, remedy: str, *, transfer: bool
) -> None:  # fmt: skip
    """Makes sure that a denoiser is the one whose fingerprint an artefact of a site holds.

    Args:
        backbone: the denoiser's.
        site: the artefact's.
        model: the fingerprint; None: any denoiser with that site will do.
        origin: how the message begins, e.g. "these anchors were collected from".
        remedy: what to do about it.
        transfer: whether another checkpoint of the same architecture will do.

    Raises:
        ArtefactError: if it is another one.
    """
    try:
        own = fingerprint(backbone, site)
    except ValueError as error:
        raise ArtefactError(f"{error}; {remedy}") from error
    for fact, wanted in (model or {}).items():
        if fact == "weights":
            if not transfer and wanted is not None and own[fact] is not None and likeness(own[fact], wanted) < SAME_WEIGHTS:
                raise ArtefactError(f"{origin} another checkpoint; {remedy}, or set transfer=True if it is a relative of that model")
        elif own.get(fact) != wanted:
            raise ArtefactError(f"{origin} a model whose {fact} is {wanted}; this one's is {own.get(fact)}; {remedy}")


def sampled(weights: Tensor) -> list[float]:
    """Entries spread evenly over a tensor."""
    flat = weights.detach().flatten()
    chosen = torch.linspace(0, len(flat) - 1, SAMPLED, device=flat.device).long().clamp(max=len(flat) - 1)  # it rounds beyond 2²⁴
    return [round(value, 6) for value in flat[chosen].float().tolist()]


def likeness(first: Any, second: Any) -> float:
    """The cosine of two lists of equal length; 0 for anything else."""
    if not isinstance(first, list) or not isinstance(second, list) or len(first) != len(second):
        return 0.0
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12))


def heads_of(module: Any, block: Any) -> int | None:
    """How many heads the attention at a probe has."""
    for part in (module, *block.modules()):
        heads = getattr(part, "heads", None)
        if isinstance(heads, int):
            return heads
    return None
