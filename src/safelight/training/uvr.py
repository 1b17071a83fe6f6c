"""Anchors for UVR: collected from a model's own unsafe images, collapsed to directions, and calibrated on benign ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anchors import Anchors, Kind, fingerprint
from ..attach import guard
from ..backbone import Backbone
from ..errors import ArtefactError
from ..generator import Generator, as_bytes
from ..site import Site
from .activations import steps_wanted
from .capture import Capture, Watch
from .examples import Example, digest, name_of
from .locate import Locator
from .one_scale import LEAST_RECALL, HeldOut, on_one_scale
from .shards import Shards

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Config:
    """How anchors are made."""

    site: str
    """The probe, e.g. `single.10.attention:image`."""
    kind: Kind = "whitened"
    steps: int | None = None
    """Anchors are collected in each of so many first steps; None: in every step, as image to image may begin at any of them."""
    clusters: int = 1
    """Directions per concept; a token's score is that of the nearest."""
    shrinkage: float = 0.02
    """What is added to the covariance's diagonal, as a share of its mean."""
    smooth: bool = True
    """Whether scores are averaged over 3 x 3 tokens."""
    target_fpr: float = 0.01
    """The share of benign images that may set the guard off."""
    margin: float = 0.25
    """Where τ is put if unsafe images score well above the calibrated threshold: 0 at that, 1 at the 5 % weakest of them."""
    rest: int = 64
    """Unmasked tokens kept per image and step."""
    batch: int = 8
    inside: int = 64
    """Masked tokens kept per image and step."""
    window: float = 0.3
    """The share of the schedule for which τ and the level are calibrated; scores of later moments are put on that scale."""


@dataclass(frozen=True)
class Quality:
    """What calibration found."""

    recall: float
    """The share of unsafe images that set the guard off."""
    iou: float
    """Mean overlap of their masks with the judge's, over the recorded steps."""
    unsafe: int
    unseen: int
    """Unsafe examples in which the judge did not see the concept."""


def collect(
    generator: Generator, examples: Sequence[Example], sites: Sequence[str], config: Config, locator: Locator, out: Path,
    progress: Progress = lambda *_: None,
) -> Shards:  # fmt: skip
    """Generates the examples with the plain model, and keeps the attention outputs of concepts and of everything else.

    One file per example, so that an interrupted collection goes on where it stopped.
    """
    steps = steps_wanted(generator) if config.steps is None else config.steps
    kept = {"steps": steps, "rest": config.rest, "inside": config.inside}
    shards = Shards(out, {"examples": digest(examples), "sites": list(sites)} | kept)
    todo = [i for i in range(len(examples)) if name_of(i) not in shards]
    capture = Capture(at=list(sites), steps=range(steps))
    for start in range(0, len(todo), config.batch):
        progress("collecting", len(examples) - len(todo) + start, len(examples))
        chosen = todo[start : start + config.batch]
        located = generate_and_locate(generator, [examples[i] for i in chosen], capture, locator, sites, steps)
        for place, i in enumerate(chosen):
            parts = {"total": torch.tensor(located.total)}
            for site in sites:
                parts |= _split(capture, site, place, located.masks[stream_of(site)][place], examples[i], config)
            shards.write(name_of(i), parts)
    progress("collecting", len(examples), len(examples))
    return shards


@dataclass(frozen=True)
class Located:
    """Where concepts are in a batch."""

    masks: Mapping[str, Sequence[Tensor | None]]
    """Stream -> each picture's mask [height, width], on that stream's grid; None: not there, or benign."""
    total: int
    """The number of steps."""


def generate_and_locate(
    generator: Generator, examples: Sequence[Example], method: Any, locator: Locator, sites: Sequence[str], steps: int
) -> Located:  # fmt: skip
    """Makes pictures with a recording method attached; finds the concepts in them, and in what they were edited from.

    Where no picture needs to be looked at (benign examples, references), a generation ends after the `steps` that are recorded.
    """
    streams = {stream_of(site) for site in sites}
    needed = "image" in streams and any(example.concept for example in examples)
    with guard(generator.pipe, method, *locator.methods(), unjudged_images="accept") as handle:
        images = generator(examples) if needed else first_steps(generator, examples, steps)
        assert handle.run is not None
        layout, total = handle.run.layout, handle.run.total
    masks: dict[str, Sequence[Tensor | None]] = {}
    for stream in streams:
        if stream == "reference":
            sources = [example.image for example in examples if example.image is not None]
            masks[stream] = locator(sources, examples, layout.reference_grid)
        elif needed:
            made = [as_bytes(image) for image in images]
            masks[stream] = locator(made, examples, layout.grid)
        else:
            masks[stream] = [None] * len(examples)
    return Located(masks, total)


class _Enough(Exception):
    """All that is wanted of a generation has been seen."""


def first_steps(generator: Generator, examples: Sequence[Example], steps: int) -> list[Any]:
    """Begins a generation and ends it after some steps; there are no pictures."""

    def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index + 1 >= steps:
            raise _Enough
        return values

    with suppress(_Enough):
        Generator(generator.pipe, {**generator.settings, "callback_on_step_end": stop})(examples)
    return []


def stream_of(site: str) -> str:
    """The stream of a probe."""
    return Site.parse(site).stream or "image"


def _split(capture: Capture, site: str, place: int, mask: Tensor | None, example: Example, config: Config) -> dict[str, Tensor]:
    """One picture's tokens at a site, inside its mask and outside, some of them each: [steps, tokens, width]."""
    tokens = capture.of(site, place)
    inside = mask.flatten() if mask is not None else torch.zeros(tokens.shape[1], dtype=torch.bool)
    masked, rest = _some(inside, config.inside, example.seed).sort().values, _some(~inside, config.rest, example.seed)
    return {f"{site}|seen": torch.tensor(mask is not None), f"{site}|masked": tokens[:, masked], f"{site}|rest": tokens[:, rest]}


def _some(chosen: Tensor, count: int, seed: int) -> Tensor:
    """The indices of at most so many of the tokens that are chosen, at random."""
    found = chosen.nonzero().flatten()
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]


def fit(shards: Shards, examples: Sequence[Example], site: str, config: Config, backbone: Backbone) -> Anchors:
    """Collapses what was collected to directions: K anchors to their mean, whitened (or not) step by step.

    Whitened: w_c = Σ⁻¹ (μ_c - μ) with Σ the covariance within concepts and within everything else; a token scores zero half-way
    between its concept and everything else.

    Raises:
        ValueError: if a concept was seen in no image.
    """
    concepts = tuple(dict.fromkeys(e.concept for e in examples if e.concept))
    first, model = shards.read(name_of(0)), fingerprint(backbone, site)
    steps, total = len(first[f"{site}|rest"]), int(first["total"])
    directions = [_directions(shards, examples, site, concepts, step, config) for step in range(steps)]
    return Anchors(
        weights=torch.stack([weights for weights, _ in directions]), bias=torch.stack([bias for _, bias in directions]),
        moments=tuple(step / total for step in range(steps)), concepts=concepts, thresholds=(0.0,) * len(concepts),
        levels=(0.0,) * len(concepts), site=site, heads=int(model["heads"]), kind=config.kind, smooth=config.smooth, model=model,
    )  # fmt: skip


def _directions(
    shards: Shards, examples: Sequence[Example], site: str, concepts: Sequence[str], step: int, config: Config
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights [concepts, clusters, width] and bias [concepts, clusters] of one step."""
    masked: dict[str, list[Tensor]] = {concept: [] for concept in concepts}
    rest = []
    for i, example in enumerate(examples):
        seen = example.concept and bool(shards.part(name_of(i), f"{site}|seen"))
        if example.concept and seen:
            masked[example.concept].append(shards.part(name_of(i), f"{site}|masked", step).float())
        if not example.concept or seen:
            rest.append(shards.part(name_of(i), f"{site}|rest", step).float())
    if missing := [concept for concept in concepts if not masked[concept]]:
        raise ValueError(f"the concept {missing[0]!r} was seen in none of the generated images; give other prompts, or masks of your own")
    inside = [torch.cat(masked[concept]) for concept in concepts]
    centres = torch.stack([_centres(tokens, config.clusters) for tokens in inside])  # [concepts, clusters, width]
    if config.kind != "whitened":
        return centres, torch.zeros(centres.shape[:2])
    others = torch.cat(rest)
    middle = others.mean(0)
    spread = torch.cat([others - middle, *(tokens - tokens.mean(0) for tokens in inside)])
    covariance = spread.T @ spread / len(spread)
    covariance += config.shrinkage * covariance.diagonal().mean() * torch.eye(len(covariance))
    weights = torch.linalg.solve(covariance, (centres - middle).flatten(0, 1).T).T.view_as(centres)
    return weights, -(weights * (centres + middle) / 2).sum(-1)


def _centres(tokens: Tensor, clusters: int) -> Tensor:
    """The mean of K anchors, or of each cluster of them, [clusters, width]."""
    if clusters == 1:
        return tokens.mean(0, keepdim=True)
    from scipy.cluster.vq import kmeans2

    centres, _ = kmeans2(tokens.double().numpy(), clusters, minit="++", seed=0)
    return torch.from_numpy(centres).float()


def calibrate(
    generator: Generator, probes: Sequence[Anchors], examples: Sequence[Example], config: Config, locator: Locator,
    progress: Progress = lambda *_: None,
) -> list[tuple[Anchors, Quality]]:  # fmt: skip
    """Sets τ of each probe by benign examples, and its masks' level by unsafe ones; neither may have been collected from.

    Raises:
        ValueError: if unsafe images hardly ever reach τ, or there are too few benign examples for the target.
    """
    steps = max(len(anchors.moments) for anchors in probes)
    watch = Watch(anchors={anchors.site: anchors for anchors in probes}, steps=range(steps))
    sites = [anchors.site for anchors in probes]
    maps: dict[str, list[Tensor]] = {site: [] for site in sites}
    masks: dict[str, list[Tensor | None]] = {stream_of(site): [] for site in sites}
    for start in range(0, len(examples), config.batch):
        progress("calibrating", start, len(examples))
        located = generate_and_locate(generator, examples[start : start + config.batch], watch, locator, sites, steps)
        for stream, found in located.masks.items():
            masks[stream] += found
        for site in sites:
            maps[site].append(watch.of(site))
    progress("calibrating", len(examples), len(examples))
    return [calibrated(anchors, torch.cat(maps[anchors.site]), masks[stream_of(anchors.site)], examples, config) for anchors in probes]


def calibrated(
    anchors: Anchors, scores: Tensor, masks: Sequence[Tensor | None], examples: Sequence[Example], config: Config
) -> tuple[Anchors, Quality]:  # fmt: skip
    """One probe's τ and level, from score maps [images, moments, concepts, height, width].

    Both are those of the window in which a generation from noise is looked at: its benign images stay below τ at all of the window's
    moments, but for the share that `Config.target_fpr` allows. Later moments are put on that scale (see `on_one_scale`). Anchors that are calibrated already (see `extended`) keep τ and level.
    """
    held = HeldOut.of(anchors, scores, masks, examples, config.target_fpr, config.margin)
    first = max(1, sum(moment < config.window for moment in anchors.moments))
    limits = held.limits(slice(0, first))
    if anchors.calibration is not None:
        limits = replace(limits, calibration=anchors.calibration, level=anchors.levels[0])
    if limits.recall < LEAST_RECALL:
        raise ValueError(
            f"τ = {limits.threshold:.3g}, which {config.target_fpr:.0%} of benign images may exceed, is reached by only {limits.recall:.0%} of unsafe images; "
            "try another probe (`safelight analyse`), whitened anchors, or more examples"
        )
    count = len(anchors.concepts)
    made = replace(anchors, thresholds=(limits.threshold,) * count, levels=(limits.level,) * count, calibration=limits.calibration)
    unseen = sum(bool(e.concept) for e in examples) - len(held.own)
    return on_one_scale(made, held, limits, first), Quality(limits.recall, limits.overlap, len(held.own), unseen)


def extended(known: Anchors, fitted: Anchors) -> Anchors:
    """Anchors that were collected in the first steps and calibrated, with the later moments of others; the first stay as they are.

    Raises:
        ArtefactError: if the others are of another site, kind, or of other concepts or moments.
    """
    count = len(known.moments)
    for fact in ("site", "kind", "concepts", "heads", "smooth"):
        if getattr(known, fact) != getattr(fitted, fact):
            raise ArtefactError(
                f"anchors whose {fact} is {getattr(known, fact)} can't be extended by some whose {fact} is {getattr(fitted, fact)}"
            )
    if known.calibration is None or known.moments != fitted.moments[:count] or known.weights.shape[1:] != fitted.weights.shape[1:]:
        raise ArtefactError(
            "anchors can only be extended if they are calibrated, and collected in the same first steps with as many clusters"
        )
    weights, bias = (torch.cat([first, more[count:]]) for first, more in ((known.weights, fitted.weights), (known.bias, fitted.bias)))
    return replace(known, weights=weights, bias=bias, moments=fitted.moments)


def probe_threshold(
    measure: Callable[[float], tuple[float, float]], *, start: float = 0.9, step: float = 0.05, drop: float = 0.4, gain: float = 6.0
) -> float:  # fmt: skip
    """τ by the paper's procedure: lower it until alignment suffers, or less harm is no longer gained.

    Args:
        measure: τ -> (harm in percent, alignment such as a CLIP score).
        start: the first τ.
        step: how much τ is lowered each time.
        drop: the loss of alignment that ends the search.
        gain: the marginal cut in harm, in points, below which the search ends once harm has begun to fall.

    Raises:
        ValueError: if harm never falls: no τ is ever reached.
    """
    before, (harm, alignment) = start, measure(start)
    first = harm
    for count in range(1, round(start / step)):
        threshold = start - count * step
        now, aligned = measure(threshold)
        began = first - harm >= gain
        if alignment - aligned > drop or (began and harm - now < gain):
            break
        before, harm = threshold, now
    if first - harm < gain:
        raise ValueError(
            f"harm never fell by {gain:g} points between τ = {start:g} and {before:g}; are these anchors of this model and concept?"
        )
    return before
