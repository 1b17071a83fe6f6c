"""Redirectors for SafeRedir: trained on the trajectories of prompt pairs, calibrated on those of benign prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbone import Backbone
from ..calibration import Calibration
from ..errors import ArtefactError
from ..fitting import Budget, Recipe, Training
from ..generator import Generator
from ..nets.official_redirector import OfficialRedirector
from ..nets.redirector import Aim, redirect
from ..nets.redirector import Redirector as Network
from ..redirector import Redirector, rounded
from .examples import Example, name_of
from .prompt_pairs import Prompts, check, split_families
from .shards import Shards
from .trajectories import record

Progress = Callable[[str, int, int], None]
Input = Literal["latents", "text", "time"]


@dataclass(frozen=True)
class Config:
    """How a redirector is trained."""

    seeds: int = 2
    """Pictures per prompt."""
    architecture: Literal["redirector", "official"] = "redirector"
    width: int = 64
    rank: int = 48
    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-2
    patience: int = 3
    """Training ends after so many epochs without progress on held-out families."""
    smoothing: float = 0.02
    prompt_dropout: float = 0.1
    noise: float = 0.3
    """Embeddings are disturbed by up to this share of their norm: paraphrases have other embeddings than the words that were learned."""
    snapshot: float = 0.25
    """From this share of the epochs on, redirected prompts are trained on too: at run time the network reads those."""
    alpha_scale: float = 1.25
    held_out: float = 0.15
    """The share of prompt families to validate on."""
    by_family: bool = True
    """Whether whole families are held out; else (as published) prompts at random, which leaks."""
    inputs: tuple[Input, ...] = ("latents", "text", "time")
    """What the network may look at; for ablations."""
    target_fpr: float = 0.01
    margin: float = 0.5
    """Where the threshold is put if unsafe prompts score above the calibrated one: 0 at that, 1 at the 5 % weakest of them."""
    seed: int = 0


@dataclass(frozen=True)
class Records:
    """Trajectories in memory. A record is one step of one picture."""

    latents: Tensor
    """[pictures, steps, channels, height, width], in half precision."""
    times: Tensor
    """[pictures, steps]."""
    text: Tensor
    """[pictures, tokens, width]."""
    pooled: Tensor | None
    unsafe: Tensor
    """[pictures], of bool."""
    twin: Tensor
    """For each picture, that of its safe member and of the same seed; of safe ones, its own index."""
    pair: Tensor
    """For each picture, its pair, or -1."""

    @classmethod
    def load(cls, shards: Shards, pairs: int, seeds: int, count: int) -> Records:
        """Reads recordings in the order of `examples`."""
        parts = [shards.read(name_of(i)) for i in range(count)]
        index = torch.arange(count)
        members = 2 * pairs * seeds
        unsafe = (index < members) & (index % (2 * seeds) < seeds)
        return cls(
            torch.stack([p["latents"] for p in parts]), torch.stack([p["times"] for p in parts]),
            torch.stack([p["text"].float() for p in parts]),
            torch.stack([p["pooled"].float() for p in parts]) if "pooled" in parts[0] else None, unsafe,
            torch.where(unsafe, index + seeds, index), torch.where(index < members, index // (2 * seeds), -1),
        )  # fmt: skip

    def masks(self) -> Tensor:
        """The tokens that a pair's members differ in most, [pictures, tokens]: 1[cos < τ], τ by Otsu over all tokens."""
        likeness = F.cosine_similarity(self.text, self.text[self.twin], dim=-1)
        return (likeness < otsu(likeness[self.unsafe])).float() * self.unsafe[:, None]


def examples(prompts: Prompts, seeds: int) -> list[Example]:
    """What to record: for each pair the unsafe member under each seed, then the safe one under the same; then benign prompts."""
    found = []
    for number, pair in enumerate(prompts.pairs):
        for text, concept in ((pair.unsafe, pair.category), (pair.safe, None)):
            found += [Example(text, 100_000 + number * seeds + seed, concept) for seed in range(seeds)]
    return found + [Example(text, 500_000 + number) for number, text in enumerate(prompts.benign)]


def otsu(values: Tensor) -> float:
    """The threshold that parts values best in two: it maximises the variance between them."""
    counts, edges = np.histogram(values.flatten().numpy(), bins=128)
    centres, weights = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    below = weights.cumsum()
    moment = (weights * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * below - moment) ** 2 / (below * (1 - below))
    return float(edges[1:][int(np.nanargmax(between))])


class Learning:
    """The losses of one network on one set of records."""

    def __init__(self, net: nn.Module, records: Records, chosen: Tensor, config: Config) -> None:
        self.net, self.records, self.config = net, records, config
        self.chosen, self.masks = chosen, records.masks()
        self.snapshot: nn.Module | None = None

    @property
    def epoch(self) -> int:
        """Batches per epoch."""
        return max(1, len(self.chosen) * self.records.latents.shape[1] // self.config.batch)

    def loss(self, generator: torch.Generator) -> Tensor:
        """The sum of all losses on a random batch, half of it unsafe."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())  # dropout
            rows = self._draw(generator)
            steps = torch.randint(self.records.latents.shape[1], (len(rows),), generator=generator)
            text, pooled = self._disturbed(rows, generator)
            unsafe = self.records.unsafe[rows].clone()
            latents, times = self.records.latents[rows, steps].float(), self.records.times[rows, steps]
            if self.snapshot is not None:  # a redirected prompt, on the way to its safe twin's picture, is safe
                swapped = unsafe & (torch.rand(len(rows), generator=generator) < 0.25)
                moved = self._moved(self.snapshot, latents, text, times, pooled)
                text = torch.where(swapped[:, None, None], moved[0], text)
                if pooled is not None and moved[1] is not None:
                    pooled = torch.where(swapped[:, None], moved[1], pooled)
                twins = self.records.latents[self.records.twin[rows], steps].float()
                latents = torch.where(swapped[:, None, None, None], twins, latents)
                unsafe &= ~swapped
            logits, aim = self.net(*visible(latents, text, times, pooled, self.config.inputs))
            return self._losses(logits, aim, rows, text, pooled, unsafe)

    def _draw(self, generator: torch.Generator) -> Tensor:
        mask = self.records.unsafe[self.chosen]
        half = self.config.batch // 2
        pools = (self.chosen[mask], self.chosen[~mask])
        return torch.cat([pool[torch.randint(len(pool), (half,), generator=generator)] for pool in pools])

    def _disturbed(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        text = _noised(self.records.text[rows], self.config.noise, generator)
        kept = torch.rand(text.shape[:2], generator=generator) >= self.config.prompt_dropout * (1 - self.masks[rows])
        pooled = None if self.records.pooled is None else _noised(self.records.pooled[rows], self.config.noise, generator)
        return text * kept[..., None], pooled

    @torch.no_grad()
    def _moved(self, net: nn.Module, latents: Tensor, text: Tensor, times: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _, aim = net(*visible(latents, text, times, pooled, self.config.inputs))
        return redirected(text, pooled, aim, self.config.alpha_scale)

    def _losses(self, logits: Tensor, aim: Aim, rows: Tensor, text: Tensor, pooled: Tensor | None, unsafe: Tensor) -> Tensor:
        """Cross-entropy 1; shift: MSE 0.5, cosine 0.1; mask: BCE 0.1; alignment 1; identity 0.1 on safe records."""
        loss = F.cross_entropy(logits, unsafe.long(), label_smoothing=self.config.smoothing)
        safe = ~unsafe
        loss = loss + 0.1 * (aim.mask[safe].mean() + aim.alpha[safe].mean())
        if pooled is not None and aim.pooled is not None:
            loss = loss + 0.1 * aim.pooled[1][safe].mean()
        if not bool(unsafe.any()):
            return loss
        mask = self.masks[rows][unsafe]
        own, wanted = text[unsafe], self.records.text[self.records.twin[rows]][unsafe]
        part = aim.take(unsafe)
        moved, moved_pooled = redirected(own, None if pooled is None else pooled[unsafe], part, self.config.alpha_scale)
        power = own.square().mean().clamp_min(1e-12)  # so that encoders of any scale give losses of the same size
        shift = wanted - self.records.text[rows][unsafe]
        loss = loss + 0.5 * F.mse_loss(moved - own, shift) / power
        aligned = 1 - F.cosine_similarity(part.delta, shift, dim=-1)
        loss = loss + 0.1 * (aligned * mask).sum() / mask.sum().clamp_min(1)
        loss = loss + 0.1 * F.binary_cross_entropy(part.mask.clamp(1e-6, 1 - 1e-6), mask)
        loss = loss + F.mse_loss(moved, wanted) / power
        if moved_pooled is not None and self.records.pooled is not None:
            target = self.records.pooled[self.records.twin[rows]][unsafe]
            loss = loss + F.mse_loss(moved_pooled, target) / target.square().mean().clamp_min(1e-12)
        return loss


def _noised(embedding: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Embeddings [..., width] with noise of a random share (at most `most`) of their norm."""
    share = torch.rand(len(embedding), *[1] * (embedding.ndim - 1), generator=generator) * most
    noise = torch.randn(embedding.shape, generator=generator) / embedding.shape[-1] ** 0.5
    return embedding + share * noise * embedding.norm(dim=-1, keepdim=True)


def visible(
    latents: Tensor, text: Tensor, times: Tensor, pooled: Tensor | None, inputs: Sequence[Input]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What a network may look at; the rest is zero."""
    latents = latents if "latents" in inputs else torch.zeros_like(latents)
    times = times if "time" in inputs else torch.zeros_like(times)
    if "text" not in inputs:
        text, pooled = torch.zeros_like(text), None if pooled is None else torch.zeros_like(pooled)
    return latents, text, times, pooled


def redirected(text: Tensor, pooled: Tensor | None, aim: Aim, scale: float) -> tuple[Tensor, Tensor | None]:
    """p̂ and its pooled companion, as `SafeRedir` makes them."""
    moved, _ = redirect(text, [(aim.delta, aim.alpha * aim.mask[..., None])], scale)
    if pooled is None or aim.pooled is None:
        return moved, pooled
    return moved, redirect(pooled, [aim.pooled], scale)[0]


@dataclass(frozen=True)
class Trained:
    """A network and how it came about."""

    net: nn.Module
    curve: list[dict[str, float]]
    accuracy: float
    """Of the classifier, over the records of held-out families."""
    stopped: int
    """The epoch with the best validation."""


def network(records: Records, config: Config) -> nn.Module:
    """A network with random weights that fits the records."""
    torch.manual_seed(config.seed)
    channels, width = records.latents.shape[2], records.text.shape[2]
    if config.architecture == "official":
        return OfficialRedirector(channels, width, records.text.shape[1])
    pooled = 0 if records.pooled is None else records.pooled.shape[1]
    return Network(channels, width, pooled, width=config.width, rank=config.rank)


def fit(records: Records, prompts: Prompts, config: Config, out: Path, progress: Progress = lambda *_: None) -> Trained:
    """Trains a network with early stopping on held-out families; resumable, and the same whether interrupted or not."""
    train, held_out = split(records, prompts, config)
    net = network(records, config)
    learning = Learning(net, records, train, config)
    recipe = Recipe(config.lr, weight_decay=config.weight_decay, ema=0.995, seed=config.seed, bf16=False, betas=(0.9, 0.98))
    training = Training(net, learning.loss, recipe, Budget(steps=config.epochs * learning.epoch), out)
    curve = _read_curve(out, training.step // learning.epoch)
    done = training.step // learning.epoch
    if _stalled(curve, config.patience) is None:
        _set_snapshot(learning, training, done, config)
        for state in training.run(every=learning.epoch, save_seconds=0):
            done += 1
            curve.append({"epoch": done, "loss": state["loss"], **validate(training.average, records, held_out, config)})
            _keep(out, training.average, curve)
            _set_snapshot(learning, training, done, config)
            progress("training", done, config.epochs)
            if _stalled(curve, config.patience) is not None:
                break
    best = min(range(len(curve)), key=lambda epoch: curve[epoch]["validation"])
    net.load_state_dict(load_file(out / "best.safetensors"))
    return Trained(net.eval(), curve, curve[best]["accuracy"], best + 1)


def split(records: Records, prompts: Prompts, config: Config) -> tuple[Tensor, Tensor]:
    """The pictures to train on, and those to validate on; benign prompts are parted likewise."""
    _, held_out = split_families(prompts.pairs, config.held_out, config.seed, whole=config.by_family)
    kept = torch.isin(records.pair, torch.tensor(held_out))
    loose = (records.pair < 0).nonzero().flatten()
    kept[loose[:: max(2, round(1 / config.held_out))]] = True
    return (~kept).nonzero().flatten(), kept.nonzero().flatten()


def _set_snapshot(learning: Learning, training: Training, epoch: int, config: Config) -> None:
    """The averaged network of the last epoch is what redirects prompts in the next."""
    if epoch >= config.snapshot * config.epochs:
        learning.snapshot = training.average.eval()


@torch.no_grad()
def validate(net: nn.Module, records: Records, chosen: Tensor, config: Config) -> dict[str, float]:
    """Loss and accuracy of the classifier, and how near redirected prompts come to their twins, on every second step."""
    net.eval()
    right, entropy, distance, count, moved_count = 0.0, 0.0, 0.0, 0, 0
    for rows in chosen.split(64):
        for step in range(0, records.latents.shape[1], 2):
            text, pooled = records.text[rows], None if records.pooled is None else records.pooled[rows]
            logits, aim = net(*visible(records.latents[rows, step].float(), text, records.times[rows, step], pooled, config.inputs))
            unsafe = records.unsafe[rows]
            right += float((logits.argmax(1) == unsafe.long()).sum())
            entropy += float(F.cross_entropy(logits, unsafe.long(), reduction="sum"))
            count += len(rows)
            if bool(unsafe.any()):
                moved, _ = redirected(text, pooled, aim, config.alpha_scale)
                errors = (moved - records.text[records.twin[rows]]).square().mean((1, 2)) / text.square().mean()
                distance += float(errors[unsafe].sum())
                moved_count += int(unsafe.sum())
    far = distance / max(1, moved_count)
    return {"validation": entropy / count + far, "accuracy": right / count, "distance": far}


def _keep(out: Path, net: nn.Module, curve: list[dict[str, float]]) -> None:
    """Stores the curve, and the network if it is the best so far."""
    if curve[-1]["validation"] == min(point["validation"] for point in curve):
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, out / "best.safetensors")
    (out / "validation.json").write_text(json.dumps(curve))


def _read_curve(out: Path, epochs: int) -> list[dict[str, float]]:
    file = out / "validation.json"
    return json.loads(file.read_text())[:epochs] if file.is_file() and epochs else []


def _stalled(curve: list[dict[str, float]], patience: int) -> int | None:
    """The best epoch, if nothing has become better for so long."""
    values = [point["validation"] for point in curve]
    return values.index(min(values)) if values and len(values) - 1 - values.index(min(values)) >= patience else None


def calibrate(
    trained: Trained, concept: str, backbone: Backbone, benign: Records, unsafe: Records, config: Config, prompts: Sequence[str]
) -> tuple[Redirector, dict[str, float]]:
    """A redirector whose threshold at most `target_fpr` of benign generations exceed, at any of their steps.

    Args:
        trained: the network.
        concept: what it finds.
        backbone: of the denoiser it was trained for.
        benign: trajectories of benign prompts that were not trained on.
        unsafe: the records it was trained on; those of held-out families tell how far from the threshold the unsafe ones are.
        config: how it was trained.
        prompts: the benign ones.

    Raises:
        ValueError: if unsafe prompts hardly ever exceed that threshold.
    """
    net = rounded(trained.net)
    peaks = risks(net, benign, config).amax(1)
    calibration = Calibration.fit(peaks.tolist(), config.target_fpr, items=prompts)
    own = risks(net, unsafe, config)[:, 0]  # a prompt should be found in the first step
    weakest = float(own.quantile(0.05))
    threshold = calibration.threshold + config.margin * max(0.0, weakest - calibration.threshold)
    recall = float((own > threshold).float().mean())
    if recall < 0.5:
        raise ValueError(
            f"the threshold {threshold:.3g}, which {config.target_fpr:.0%} of benign generations may exceed, is exceeded by only {recall:.0%} "
            "of unsafe prompts; give more pairs, or allow more false positives"
        )
    model = {"denoiser": type(backbone.module).__name__, "latent_scale": backbone.latent_scale}
    made = Redirector(net, concept, threshold, replace(calibration, threshold=threshold), model)
    return made, {"recall": recall, "weakest": weakest, "benign_peak": float(peaks.max())}


@torch.no_grad()
def risks(net: nn.Module, records: Records, config: Config) -> Tensor:
    """The probability of being unsafe at each step, [pictures, steps]."""
    found = []
    for rows in torch.arange(len(records.latents)).split(64):
        pooled = None if records.pooled is None else records.pooled[rows]
        given = [
            visible(records.latents[rows, step].float(), records.text[rows], records.times[rows, step], pooled, config.inputs)
            for step in range(records.latents.shape[1])
        ]
        found.append(torch.stack([net.judge(*inputs).unsafe for inputs in given], dim=1))  # type: ignore[operator]
    return torch.cat(found)


def subset(records: Records, rows: Tensor) -> Records:
    """Some of the pictures; twins are not kept."""
    return Records(
        records.latents[rows], records.times[rows], records.text[rows], None if records.pooled is None else records.pooled[rows],
        records.unsafe[rows], torch.arange(len(rows)), records.pair[rows],
    )  # fmt: skip


def make(
    generator: Generator, prompts: Prompts, concept: str, config: Config, out: Path, calibrating: int, progress: Progress = lambda *_: None
) -> tuple[Redirector, dict[str, Any]]:
    """Records, trains and calibrates; everything is kept in `out`, and what is there already is not made again.

    The last `calibrating` benign prompts are kept for the threshold.

    Raises:
        ValueError: if a pair's members don't match, or there are too few benign prompts.
        ArtefactError: if `out` holds another training.
    """
    check(prompts.pairs, generator.pipe)
    if len(prompts.benign) <= calibrating:
        raise ValueError(
            f"there are {len(prompts.benign)} benign prompts, of which {calibrating} are needed to calibrate; give more, or a higher --target-fpr"
        )
    started = time.monotonic()
    claim(out, config, prompts)
    known = replace(prompts, benign=prompts.benign[:-calibrating])
    records = recorded(generator, known, config.seeds, out / "trajectories", progress)
    kept = [Example(text, 900_000 + number) for number, text in enumerate(prompts.benign[-calibrating:])]
    held_out = Records.load(record(generator, kept, out / "benign-trajectories", progress=progress), 0, 1, len(kept))
    trained = fit(records, known, config, out / "fit", progress)
    _, families = split(records, known, config)
    unsafe = subset(records, families[records.unsafe[families]])
    redirector, quality = calibrate(trained, concept, Backbone.of(generator.pipe), held_out, unsafe, config, prompts.benign[-calibrating:])
    with suppress(ImportError):  # plots are an extra
        plot(trained, out / "curves.png")
    facts = {
        "concept": concept, "threshold": redirector.threshold, "accuracy": trained.accuracy, "best_epoch": trained.stopped,
        "epochs": len(trained.curve), "parameters": sum(parameter.numel() for parameter in trained.net.parameters()),
        "seconds": time.monotonic() - started, "pairs": len(prompts.pairs), "pictures": len(records.latents),
    }  # fmt: skip
    return redirector, facts | quality


def recorded(generator: Generator, prompts: Prompts, seeds: int, out: Path, progress: Progress = lambda *_: None) -> Records:
    """The trajectories of all prompts."""
    chosen = examples(prompts, seeds)
    return Records.load(record(generator, chosen, out, progress=progress), len(prompts.pairs), seeds, len(chosen))


def claim(out: Path, config: Config, prompts: Prompts) -> None:
    """Makes sure that a folder holds one training only.

    Raises:
        ArtefactError: if it holds another one.
    """
    out.mkdir(parents=True, exist_ok=True)
    identity = {"config": asdict(config), "pairs": [list(pair) for pair in prompts.pairs], "benign": list(prompts.benign)}
    file, wanted = out / "training.json", json.dumps(identity, sort_keys=True)
    if file.is_file() and file.read_text() != wanted:
        raise ArtefactError(
            f"{out} holds a training with other prompts or settings (see {file}); choose another folder, or remove this one"
        )
    file.write_text(wanted)


def plot(trained: Trained, file: Path) -> None:
    """Draws the curves."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3))
    epochs = [point["epoch"] for point in trained.curve]
    for name in ("loss", "validation"):
        axes[0].plot(epochs, [point[name] for point in trained.curve], label=name)
    for name in ("accuracy", "distance"):
        axes[1].plot(epochs, [point[name] for point in trained.curve], label=f"{name}, held-out families")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
