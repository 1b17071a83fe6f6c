"""Where and when unsafe semantics can be seen in a denoiser: information flow, and localisation quality by block and step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..anchors import Anchors
from ..attach import guard
from ..backbone import Backbone
from ..flow import Heads
from ..generator import Generator
from ..masks import clean, iou
from ..method import Method
from ..site import Site, Stream
from .capture import Watch
from .examples import Example
from .locate import Locator
from .uvr import Config, Progress, collect, fit, generate_and_locate

STREAMS: tuple[Stream, ...] = get_args(Stream)
NEAR_BEST = 0.95
"""The first step whose quality is this share of the best ends the start-up stage."""


@dataclass(kw_only=True, eq=False)
class Flow(Method):
    """Measures how much attention each group of tokens pays to each other one; the images stay bit-identical.

    A^{X→Y}(t, l) of UVR (Yang et al., 2026, https://arxiv.org/abs/2606.06875), from Y's queries to X's keys.
    """

    at: Sequence[Site | str]
    """The attentions."""
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(site, step) -> [queries' stream, keys' stream] of the latest generation, on the CPU."""

    def begin(self) -> None:
        """Drops what was kept of the generation before."""
        self.kept.clear()

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """The attentions."""
        return self.at

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        """One more fused call, whose values tell the streams apart, sums the probabilities without making them."""
        self.kept[str(site), self.run.index] = masses(heads, attend).cpu()
        return attend(heads)


def masses(heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
    """The mean share of attention that queries of each stream (rows) pay to keys of each stream (columns); NaN without queries."""
    value = torch.zeros_like(heads.value)
    for column, stream in enumerate(STREAMS):
        if stream in heads.keys:
            value[:, :, heads.keys[stream], column] = 1
    seen = attend(replace(heads, value=value))[..., : len(STREAMS)].float()
    rows = [seen[:, :, heads.queries.get(stream, slice(0, 0))].mean((0, 1, 2)) for stream in STREAMS]
    return torch.stack(rows)


@dataclass(frozen=True)
class Quality:
    """How well one probe localises at one step."""

    site: str
    step: int
    auroc: float
    """Of images: unsafe against benign, by their highest score."""
    token_auroc: float
    """Of tokens of unsafe images: inside the mask against outside."""
    iou: float
    """With the judge's mask of the final image; 0 for an image that stays below the 2 % benign threshold."""


def flow(generator: Generator, examples: Sequence[Example], batch: int = 4) -> dict[tuple[str, int], Tensor]:
    """(site, step) -> mean attention between streams [queries, keys]."""
    backbone = Backbone.of(generator.pipe)
    measure = Flow(at=list(backbone.sites(*backbone.attentions)))
    sums: dict[tuple[str, int], Tensor] = {}
    for start in range(0, len(examples), batch):
        chosen = examples[start : start + batch]
        with guard(generator.pipe, measure, unjudged_images="accept"):
            generator(chosen)
        for key, found in measure.kept.items():
            sums[key] = sums.get(key, torch.zeros_like(found)) + found * len(chosen) / len(examples)
    return sums


def localisation(
    generator: Generator, collected: Sequence[Example], held_out: Sequence[Example], sites: Sequence[str], config: Config,
    locator: Locator, out: Path, progress: Progress = lambda *_: None,
) -> list[Quality]:  # fmt: skip
    """Quality of every probe at every step, on examples that anchors were not collected from."""
    shards = collect(generator, collected, sites, config, locator, out, progress)
    backbone = Backbone.of(generator.pipe)
    anchors = {site: fit(shards, collected, site, replace(config, site=site), backbone) for site in sites}
    steps = len(anchors[sites[0]].moments)
    watch = Watch(anchors=anchors, steps=range(steps))
    maps: dict[str, list[Tensor]] = {site: [] for site in sites}
    masks: list[Tensor | None] = []
    for start in range(0, len(held_out), config.batch):
        progress("watching", start, len(held_out))
        masks += generate_and_locate(generator, held_out[start : start + config.batch], watch, locator, sites, steps).masks["image"]
        for site in sites:
            maps[site].append(watch.of(site))
    progress("watching", len(held_out), len(held_out))
    return [quality(site, step, torch.cat(maps[site])[:, step], masks, held_out, anchors[site]) for site in sites for step in range(steps)]


def quality(site: str, step: int, maps: Tensor, masks: Sequence[Tensor | None], examples: Sequence[Example], anchors: Anchors) -> Quality:
    """One probe at one step: maps [images, concepts, height, width]."""
    benign = maps[[i for i, example in enumerate(examples) if not example.concept]].amax(dim=(1, 2, 3))
    seen = [
        (i, anchors.concepts.index(e.concept), mask)
        for i, (e, mask) in enumerate(zip(examples, masks, strict=True))
        if e.concept and mask is not None
    ]
    own = torch.stack([maps[i, concept] for i, concept, _ in seen])
    wanted = torch.stack([mask for _, _, mask in seen])
    tops = own.amax(dim=(1, 2))
    threshold = float(benign.quantile(0.98))
    levels = own[wanted].quantile(torch.linspace(0.02, 0.6, 12)).clamp(max=max(threshold, float(own.min())))
    fired = (tops > threshold).float()
    overlap = max(float((iou(clean(own > level, own.sigmoid()), wanted) * fired).mean()) for level in levels)
    tokens = sum(auroc(scores[mask], scores[~mask]) for scores, mask in zip(own, wanted, strict=True)) / len(own)
    return Quality(site, step, auroc(tops, benign), tokens, overlap)


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive's score is above a negative's; ties count half."""
    wins = (positive[:, None] > negative[None]).float() + 0.5 * (positive[:, None] == negative[None]).float()
    return float(wins.mean())


@dataclass(frozen=True)
class Choice:
    """What to use for a backbone that has no published values."""

    site: str
    """The probe that localises best."""
    steps: int
    """Steps of the start-up stage: by then the probe is as good as it gets."""
    share: float
    """The same as a share of all steps."""


def choose(found: Sequence[Quality], total: int) -> Choice:
    """The probe with the best mean overlap, and the first step at which it is nearly as good as at its best."""
    sites = list(dict.fromkeys(one.site for one in found))
    curves = {site: [one.iou for one in found if one.site == site] for site in sites}
    best = max(sites, key=lambda site: sum(curves[site]) / len(curves[site]))
    steps = next(step for step, value in enumerate(curves[best]) if value >= NEAR_BEST * max(curves[best])) + 1
    return Choice(best, steps, steps / total)


def plot_localisation(found: Sequence[Quality], out: Path) -> None:
    """Image AUROC, token AUROC and overlap, blocks by steps."""
    pyplot = _pyplot()
    sites = list(dict.fromkeys(one.site for one in found))
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 1 + 0.45 * len(sites)), constrained_layout=True)
    for axis, name, title in zip(
        axes,
        ("auroc", "token_auroc", "iou"),
        ("unsafe or benign image (AUROC)", "tokens (AUROC)", "overlap with the final object (IoU)"),
        strict=True,
    ):
        table = [[getattr(one, name) for one in found if one.site == site] for site in sites]
        shown = axis.imshow(table, aspect="auto", vmin=0.5 if "auroc" in name else 0, vmax=1, cmap="viridis")
        axis.set(title=title, xlabel="step", yticks=range(len(sites)), yticklabels=sites if axis is axes[0] else [])
        figure.colorbar(shown, ax=axis)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def plot_flow(found: dict[tuple[str, int], Tensor], out: Path) -> None:
    """For each pair of streams, attention by block and step."""
    pyplot = _pyplot()
    sites = list(dict.fromkeys(site for site, _ in found))
    steps = sorted({step for _, step in found})
    table = torch.stack([torch.stack([found[site, step] for step in steps]) for site in sites])  # [sites, steps, queries, keys]
    pairs = [(q, k) for q in range(len(STREAMS)) for k in range(len(STREAMS)) if bool(table[..., q, k].nan_to_num().any())]
    figure, axes = pyplot.subplots(
        1, len(pairs), figsize=(3.2 * len(pairs), 1.2 + 0.4 * len(sites)), constrained_layout=True, squeeze=False
    )
    for axis, (queries, keys) in zip(axes[0], pairs, strict=True):
        shown = axis.imshow(table[..., queries, keys].numpy(), aspect="auto", cmap="magma", vmin=0)
        axis.set(
            title=f"{STREAMS[keys]} → {STREAMS[queries]}",
            xlabel="step",
            yticks=range(len(sites)),
            yticklabels=sites if axis is axes[0][0] else [],
        )
        figure.colorbar(shown, ax=axis)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib; install safelight[plots]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
