"""Safety dictionaries for SafeDIG: recorded, routed, trained, transferred and calibrated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..anchors import fingerprint, sampled
from ..attach import guard
from ..backbone import Backbone
from ..calibration import Calibration
from ..dictionary import Dictionary, Operator, stored
from ..errors import ArtefactError
from ..generator import Generator
from ..methods.safedig import SafeDIG
from ..nets.sae import SAE
from ..site import Site
from .activations import Sampling, examples_of, read_site, record, steps_of, steps_wanted
from .domains import Domains
from .examples import Example
from .harm import alarm, harmful_features, held_out_separation, peaks
from .routing import Contrasts, Proxy, Routing, Weights, group_of, plot, pooled, route
from .sae_learning import Report, SAEConfig, learn
from .shards import Shards
from .transfer import Domain, TransferConfig, adapt
from .uvr import first_steps

Progress = Callable[[str, int, int], None]
FEW = 6
"""Of a kind with at most so many blocks, every block is a candidate; of others the middle and the last."""
WATCH = SafeDIG(dictionaries=()).watch
ROUTED = 64
"""Benign prompts on which routing measures what a proxy operator changes."""


@dataclass(frozen=True)
class Config:
    """How dictionaries are made."""

    sites: tuple[str, ...] = ()
    """Candidates; none: the prompt, and blocks' image streams."""
    fixed: tuple[str, ...] = ()
    """Positions to use whatever routing says; for ablations."""
    operator: Operator | None = None
    """The operator to use whatever routing says."""
    positions: int = 2
    times: int = 5
    tokens: int | None = None
    """Tokens kept per site, picture and time; None: all."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    text_k: int = 64
    """k at text sites."""
    harmful: int = 128
    """M: how many features count as harmful, per time point."""
    read: int = 256
    """How many features the gate reads."""
    ridges: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    """What the gate's reading is regularised with: the one that tells held-out pairs apart best."""
    transfer: TransferConfig = field(default_factory=TransferConfig)
    weights: Weights = field(default_factory=Weights)
    target_fpr: float = 0.01
    margin: float = 0.5
    """Where the threshold is put if unsafe prompts score above the calibrated one: 0 at that, 1 at the 5 % weakest of them."""
    batch: int = 8


def testbed_config() -> Config:
    """What suits the testbed's small models."""
    return Config(
        sae=SAEConfig(expansion=4, k=16, lr=5e-3, batch=2048, epochs=8, dead_after=100_000, revived=64), text_k=16, harmful=32, read=768
    )


@dataclass(frozen=True)
class Recorded:
    """Activations on disk, in the order source pairs, target pairs, benign prompts."""

    shards: Shards
    domains: Domains

    def pairs(self, site: str, *, target: bool) -> tuple[Tensor, Tensor]:
        """Activations of both members of a domain's pairs, [pairs, times, tokens, width] each."""
        start = 2 * len(self.domains.source) if target else 0
        count = len(self.domains.target if target else self.domains.source)
        tokens = read_site(self.shards, site, range(start, start + 2 * count))
        return tokens[0::2], tokens[1::2]

    def known(self, dictionary: Dictionary) -> list[tuple[Tensor, Tensor]]:
        """The pairs of the domains that a dictionary was made for; without transfer, the source's alone."""
        return [self.pairs(dictionary.site, target=target) for target in (False, True)[: len(dictionary.risks)]]

    def benign(self, site: str) -> Tensor:
        """Activations of benign prompts, [prompts, times, tokens, width]."""
        start = 2 * (len(self.domains.source) + len(self.domains.target))
        return read_site(self.shards, site, range(start, start + len(self.domains.benign[:ROUTED])))


def candidates(backbone: Backbone) -> tuple[str, ...]:
    """The prompt, and image streams of blocks: all of a small model, else the middle and the last of each kind.

    Raises:
        ValueError: if the denoiser is no diffusion transformer.
    """
    kinds = [kind for kind in ("joint", "single") if kind in backbone.blocks]
    if not kinds:
        raise ValueError(
            f"SafeDIG steers diffusion transformers, and {type(backbone.module).__name__} is none; use saferedir or dual_latent"
        )
    found = ["prompt:text"]
    for kind in kinds:
        count = len(backbone.paths(kind))
        chosen = range(count) if count <= FEW else (count // 2, count - 1)
        found += [f"{kind}.{index}:image" for index in chosen]
    return tuple(found)


def gather(
    generator: Generator, domains: Domains, config: Config, out: Path, progress: Progress = lambda *_: None
) -> Recorded:  # fmt: skip
    """Records both members of all pairs, and the benign prompts of routing; what is in `out` already is not made again.

    Raises:
        ValueError: if a domain is empty, or the members of a pair are the same.
    """
    for name, pairs in zip(domains.names, (domains.source, domains.target), strict=True):
        if not pairs:
            raise ValueError(f"the domain {name!r} is empty; give at least a few pairs of it")
        if same := next((pair for pair in pairs if pair.unsafe == pair.safe), None):
            raise ValueError(f"the members of a pair are the same, {same.unsafe!r}; there is no contrast between them")
    backbone = Backbone.of(generator.pipe)
    sites = config.fixed or config.sites or candidates(backbone)
    loose = [Example(prompt, 600_000 + number) for number, prompt in enumerate(domains.benign[:ROUTED])]
    examples = [*examples_of([*domains.source, *domains.target]), *loose]
    sampling = Sampling(tuple(sites), config.times, config.tokens)
    _claim(out, generator, backbone)
    return Recorded(record(generator, examples, sampling, out / "activations", batch=config.batch, progress=progress), domains)


def _claim(out: Path, generator: Generator, backbone: Backbone) -> None:
    """Makes sure that a folder holds activations of one model only."""
    out.mkdir(parents=True, exist_ok=True)
    identity = {
        "denoiser": type(backbone.module).__name__, "weights": sampled(next(backbone.module.parameters())),
        "settings": {name: str(value) for name, value in sorted(generator.settings.items())},
    }  # fmt: skip
    file, wanted = out / "model.json", json.dumps(identity)
    if file.is_file() and file.read_text() != wanted:
        raise ArtefactError(f"{out} holds activations of another model, or made with other settings (see {file}); choose another folder")
    file.write_text(wanted)


def contrasts(recorded: Recorded, sites: Sequence[str], backbone: Backbone, config: Config) -> Contrasts:
    """What routing needs, from recorded activations; the target's pairs count as unlabelled prompts."""
    shifts: dict[str, Tensor] = {}
    foretold: dict[str, float] = {}
    updates: dict[str, Tensor] = {}
    benign: dict[str, Tensor] = {}
    for site in sites:
        unsafe, safe = recorded.pairs(site, target=False)
        shifts[site] = pooled(unsafe, safe)
        proxy = Proxy(unsafe, safe)
        others, harmless = recorded.pairs(site, target=True)[0], recorded.benign(site)
        for operator in get_args(Operator):
            foretold[f"{site}|{operator}"] = proxy.foretold(unsafe, safe, operator)
            updates[f"{site}|{operator}"] = torch.cat([proxy.updates(tokens, operator) for tokens in (unsafe, others)])
            benign[f"{site}|{operator}"] = proxy.updates(harmless, operator)
    names = sorted({pair.category for pair in recorded.domains.source})
    categories = torch.tensor([names.index(pair.category) for pair in recorded.domains.source])
    flops = {site: flops_share(shifts[site].shape[-1], site, backbone, config) for site in sites}
    return Contrasts(shifts, categories, foretold, updates, benign, flops)


def flops_share(width: int, site: str, backbone: Backbone, config: Config) -> float:
    """What encoding and decoding tokens of a site costs, by what the denoiser spends on as many tokens."""
    directions = min(config.sae.reduced or width, width)
    return 2 * directions * config.sae.expansion * directions / sum(parameter.numel() for parameter in backbone.module.parameters())


def train_sae(
    recorded: Recorded, site: str, config: Config, out: Path, progress: Progress = lambda *_: None, device: str = "cpu"
) -> tuple[SAE, Report]:  # fmt: skip
    """An SAE of the source domain's activations at one site."""
    tokens = torch.cat([member.flatten(0, 2) for member in recorded.pairs(site, target=False)])
    k = config.text_k if Site.parse(site).stream == "text" else config.sae.k
    return learn(tokens, replace(config.sae, k=k), out / f"sae-{site.replace(':', '-')}", progress, device, name=f"SAE at {site}")


def assemble(
    recorded: Recorded, site: str, operator: Operator, sae: SAE, backbone: Backbone, config: Config, total: int, *, transfer: bool = True
) -> Dictionary:  # fmt: skip
    """A dictionary of one site; without transfer, its decoder and harmful features are the source's."""
    parts = {target: recorded.pairs(site, target=target) for target in (False, True)}
    domains = {target: Domain(*(member.flatten(0, 2) for member in members)) for target, members in parts.items()}
    adapted = adapt(sae, sae.decoder, domains[False], None, config.transfer)
    if transfer:
        adapted = adapt(sae, adapted, domains[True], domains[False], config.transfer)
    known = list(parts.values()) if transfer else [parts[False]]
    moments = tuple(step / total for step in steps_of(total, config.times))
    looks = watched(moments, WATCH)
    sounding = alarm(sae, known, recorded.benign(site), looks, config.read)
    risks = recorded.domains.names if transfer else recorded.domains.names[:1]
    return Dictionary(
        *stored(sae, adapted), harmful_features(sae, known, config.harmful), sounding, moments, site, operator, risks=tuple(dict.fromkeys(risks)),
        model=fingerprint(backbone, site),
    )  # fmt: skip


def watched(moments: Sequence[float], watch: float) -> list[int]:
    """The time points in which a gate looks; the first at least."""
    return [index for index, moment in enumerate(moments) if moment < watch] or [0]


def calibrate(
    generator: Generator, dictionaries: Sequence[Dictionary], recorded: Recorded, config: Config, progress: Progress = lambda *_: None
) -> tuple[tuple[Dictionary, ...], dict[str, Any]]:  # fmt: skip
    """Makes one dictionary look, with a calibrated threshold: the one by which most unsafe pictures are found.

    Each threshold is held to the confidence divided by how many there are, so that the promise survives the choice.

    Raises:
        ValueError: if unsafe pictures hardly ever exceed it, or there are too few benign prompts.
    """
    prompts, confidence = recorded.domains.benign[ROUTED:], 1 - 0.05 / len(dictionaries)
    gates = []
    for dictionary in dictionaries:
        looking, facts, unsafe = _looking(dictionary, recorded, config)
        scores = benign_scores(generator, looking, prompts, config.batch, progress)
        weakest = float(unsafe.quantile(0.05))
        calibration = Calibration.fit(scores, config.target_fpr, confidence, prompts).towards(weakest, config.margin, scores)
        recall = float((unsafe > calibration.threshold).float().mean())
        facts |= {"gate": dictionary.site, "recall": recall, "weakest": weakest, "benign_peak": max(scores)}
        gates.append((facts, replace(looking, threshold=calibration.threshold, calibration=calibration)))
    best = max(range(len(gates)), key=lambda index: (gates[index][0]["recall"], gates[index][0]["auc"]))
    facts, chosen = gates[best]
    if facts["recall"] < 0.5:
        raise ValueError(
            f"the threshold {chosen.threshold:.3g}, which {config.target_fpr:.0%} of benign pictures may exceed, is exceeded by only "
            f"{facts['recall']:.0%} of unsafe ones; give more pairs, other positions, or allow more false positives"
        )
    return tuple(
        chosen if index == best else replace(one, threshold=None, calibration=None) for index, one in enumerate(dictionaries)
    ), facts


def _looking(dictionary: Dictionary, recorded: Recorded, config: Config) -> tuple[Dictionary, dict[str, Any], Tensor]:
    """A dictionary with the reading that tells held-out pairs apart best (fitted on all), how well, and the scores of unsafe pictures."""
    members, benign = recorded.known(dictionary), recorded.benign(dictionary.site)
    times = watched(dictionary.moments, WATCH)
    found = [(held_out_separation(dictionary.sae, members, benign, times, config.read, ridge), ridge) for ridge in config.ridges]
    auc, ridge = max(found, key=lambda one: one[0])
    made = replace(dictionary, alarm=alarm(dictionary.sae, members, benign, times, config.read, ridge))
    return made, {"auc": auc, "ridge": ridge}, peaks(made.sae, made.alarm, torch.cat([unsafe for unsafe, _ in members]), times)


def benign_scores(
    generator: Generator, dictionary: Dictionary, prompts: Sequence[str], batch: int, progress: Progress = lambda *_: None
) -> list[float]:  # fmt: skip
    """The highest score that the gate would see for each prompt."""
    found: list[float] = []
    method = SafeDIG(dictionaries=(replace(dictionary, threshold=float("inf")),))
    steps = max(1, round(method.watch * steps_wanted(generator)))
    examples = [Example(prompt, 700_000 + number) for number, prompt in enumerate(prompts)]
    for start in range(0, len(examples), 2 * batch):
        progress("calibrating", start, len(examples))
        with guard(generator.pipe, method, unjudged_images="accept") as handle:
            first_steps(generator, examples[start : start + 2 * batch], steps)
            assert handle.run is not None
            found += [float(record.actions[0].score or 0.0) for record in handle.run.records([0])]
    progress("calibrating", len(examples), len(examples))
    return found


@dataclass(frozen=True)
class Made:
    """The dictionaries, and how they came about."""

    dictionaries: tuple[Dictionary, ...]
    routing: Routing
    report: Mapping[str, Any]


def make(
    generator: Generator, domains: Domains, config: Config, out: Path, progress: Progress = lambda *_: None, device: str = "cpu"
) -> Made:  # fmt: skip
    """The whole way, from pairs to calibrated dictionaries; every part is resumed from `out`.

    Writes `routing.json`, `routing.png`, `contrasts.safetensors`, an SAE's curves for each position, and `report.json`.
    """
    started = time.monotonic()
    recorded, backbone = gather(generator, domains, config, out, progress), Backbone.of(generator.pipe)
    routing = routed(recorded, backbone, config, out)
    total, parts, quality = steps_wanted(generator), [], {}
    for one in routing.chosen:
        sae, report = train_sae(recorded, one.site, config, out, progress, device)
        quality[one.site] = asdict(report) | {"latents": sae.latents, "k": sae.k}
        parts.append(assemble(recorded, one.site, config.operator or one.operator, sae, backbone, config, total))
    dictionaries, gate = calibrate(generator, parts, recorded, config, progress)
    counts = {"source": len(domains.source), "target": len(domains.target), "benign": len(domains.benign)}
    report_ = {
        "positions": {part.site: part.operator for part in parts}, "steady": routing.steady, "sae": quality, **gate, "pairs": counts,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(report_, indent=2) + "\n")
    return Made(dictionaries, routing, report_)


def routed(recorded: Recorded, backbone: Backbone, config: Config, out: Path) -> Routing:
    """Routing of recorded pairs, written to `out`."""
    sites = config.fixed or config.sites or candidates(backbone)
    found = contrasts(recorded, sites, backbone, config)
    found.save(out / "contrasts.safetensors")
    counts = [len(backbone.paths(kind)) if kind in backbone.blocks else 0 for kind in ("joint", "single")]
    groups = {site: site if config.fixed else group_of(site, *counts) for site in sites}
    routing = route(found, groups, config.weights, len(config.fixed) or config.positions)
    rows = {"candidates": routing.rows(), "weights": asdict(routing.weights), "steady": routing.steady}
    (out / "routing.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(routing, out / "routing.png")
    return routing
