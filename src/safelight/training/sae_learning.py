"""Sparse autoencoders, learned from recorded activations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..anchors import sampled
from ..errors import ArtefactError
from ..fitting import Budget, Recipe, Training
from ..nets.sae import SAE, batch_threshold, fraction_of_variance_unexplained, geometric_median, principal_basis
from ..tables import lines_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SAEConfig:
    """How an SAE is trained; the defaults are the lineage's."""

    expansion: int = 16
    """Latents per direction of the activations."""
    k: int = 32
    """Active latents per token, on average."""
    lr: float = 4e-4
    """Adam's, falling linearly."""
    batch: int = 4096
    epochs: float = 5
    auxiliary: float = 1 / 32
    """The weight of the loss with which dead latents explain what the living ones leave."""
    dead_after: int = 200_000
    """Tokens without firing after which a latent counts as dead."""
    revived: int = 256
    """k of the auxiliary loss."""
    reduced: int | None = None
    """So many principal directions are looked at; the rest passes every edit. None: all."""
    held_out: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """How good an SAE is, on tokens that it wasn't trained on."""

    fvu: float
    """Fraction of variance unexplained, with the sparsity of inference."""
    dead: float
    """The share of latents that fired for none of the training's last tokens."""
    active: float
    """Mean number of active latents per token."""
    tokens: int
    """Tokens seen in training, repetitions included."""
    seconds: float


class Learner(nn.Module):
    """An SAE in training. Its decoder's rows have unit norm: in the loss, so that the gradient along them vanishes, and after each step,
    since rows that grow turn ever more slowly. What is dead is remembered.
    """

    def __init__(self, sae: SAE, config: SAEConfig) -> None:
        super().__init__()
        self.sae, self.config = sae, config
        self.register_buffer("idle", torch.zeros(sae.latents))
        self.idle: Tensor

    def loss(self, seen: Tensor) -> Tensor:
        """FVU, and the auxiliary loss over dead latents, of what the encoder sees [tokens, width]."""
        with torch.no_grad():
            self.sae.decoder.weight.copy_(F.normalize(self.sae.decoder.weight, dim=1))
        weight = F.normalize(self.sae.decoder.weight, dim=1)
        before = F.relu(self.sae.encoder(seen - self.sae.b_pre))
        with torch.no_grad():
            limit = batch_threshold(before, self.sae.k)
        values = before * (before >= limit)
        missed = seen - (values @ weight + self.sae.decoder.bias)
        power = (seen - seen.mean(0)).square().sum().clamp_min(1e-12)
        loss = missed.square().sum() / power
        dead = self.idle > self.config.dead_after
        with torch.no_grad():
            fired = (values > 0).any(0)
            self.idle += len(seen)
            self.idle[fired] = 0
        if not bool(dead.any()):
            return loss
        return loss + self.config.auxiliary * self._revival(before[:, dead], weight[dead], missed.detach())

    def _revival(self, before: Tensor, weight: Tensor, missed: Tensor) -> Tensor:
        """What dead latents, [tokens, dead], leave of the error (AuxK, Gao et al., 2024, https://arxiv.org/abs/2406.04093)."""
        top = before.topk(min(self.config.revived, before.shape[1]), dim=-1)
        explained = torch.zeros_like(before).scatter(-1, top.indices, top.values) @ weight
        return (missed - explained).square().sum() / missed.square().sum().clamp_min(1e-12)


def learn(
    tokens: Tensor, config: SAEConfig, out: Path, progress: Progress = lambda *_: None, device: str = "cpu", name: str = "SAE"
) -> tuple[SAE, Report]:  # fmt: skip
    """Trains an SAE on activations [tokens, width]; resumable. Curve, plot and report go to `out`.

    Raises:
        ValueError: if there are fewer tokens than a batch, or they hold NaN.
        ArtefactError: if `out` holds the training of another SAE.
    """
    train, held_out = split(tokens, config)
    _claim(out, config, tokens)
    sae = started(train, config).to(device)
    learner = Learner(sae, config).to(device)
    seen = [sae.inward(part.to(device).float()).cpu() for part in train.split(65_536)]
    inner = torch.cat(seen)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(inner), (config.batch,), generator=generator)
        return learner.loss(inner[rows].to(device))

    steps = max(1, math.ceil(config.epochs * len(inner) / config.batch))
    # Adam with a linear decay; the averaged weights are as good and less noisy than the last ones. The loss falls by orders of magnitude,
    # and a β2 of 0.999 would remember its first gradients for too long.
    recipe = Recipe(config.lr, betas=(0.9, 0.98), weight_decay=0.0, warmup=0.02, decay=0.98, ema=0.99, seed=config.seed, bf16=False)
    training = Training(learner, loss, recipe, Budget(steps=steps), out, device)
    for state in training.run(every=max(1, min(50, steps // 10)), save_seconds=30):
        progress(f"{name} (FVU {state['loss']:.3f})"[:36], int(state["step"]), steps)
    average = training.average
    assert isinstance(average, Learner)
    made = finished(average.sae, inner.to(device))
    report = measure(made, held_out.to(device), average.idle, len(inner), config, training)
    (out / "report.json").write_text(json.dumps(asdict(report) | {"config": asdict(config)}, indent=2) + "\n")
    with suppress(ImportError):  # plots are an extra
        plot(out)
    return made.cpu(), report


def _claim(out: Path, config: SAEConfig, tokens: Tensor) -> None:
    """Makes sure that a folder holds one training only."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "training.json"
    wanted = json.dumps(asdict(config) | {"tokens": list(tokens.shape), "sample": sampled(tokens)}, sort_keys=True)
    if file.is_file() and file.read_text() != wanted:
        raise ArtefactError(f"{out} holds the training of another SAE (see {file}); choose another folder, or remove this one")
    file.write_text(wanted)


def split(tokens: Tensor, config: SAEConfig) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and held-out ones.

    Raises:
        ValueError: if there are too few, or they hold NaN.
    """
    if len(tokens) < 2 * config.batch:
        raise ValueError(
            f"{len(tokens)} tokens are too few for batches of {config.batch}; record more prompts or steps, or use smaller batches"
        )
    if not bool(torch.isfinite(tokens).all()):
        raise ValueError("the activations hold NaN or infinity; record them again, in a precision in which the model runs")
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))
    count = max(1, round(config.held_out * len(tokens)))
    return tokens[order[count:]], tokens[order[:count]]


def started(tokens: Tensor, config: SAEConfig) -> SAE:
    """An untrained SAE: b_pre and b_dec at the geometric median, W_enc the transpose of W_dec."""
    sample = tokens[:16_384].float()
    full = sample.shape[1]
    width = min(config.reduced or full, full)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sae = SAE(width, config.expansion * width, config.k, full_width=full if width < full else None)
    with torch.no_grad():
        if sae.basis is not None:
            sae.basis.copy_(principal_basis(sample, width))
        sae.scale.copy_((sample - sample.mean(0)).square().mean().sqrt().clamp_min(1e-12))
        median = geometric_median(sae.inward(sample))
        sae.b_pre.copy_(median)
        sae.decoder.bias.copy_(median)
    return sae


@torch.no_grad()
def finished(sae: SAE, seen: Tensor) -> SAE:
    """With rows of unit norm, in the precision in which it is stored, and the threshold that keeps k features per token."""
    sae.decoder.weight.copy_(F.normalize(sae.decoder.weight, dim=1))
    for parameter in sae.parameters():
        parameter.copy_(parameter.half().float())
    sample = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(1))[:8192].to(seen.device)]
    sae.threshold.copy_(batch_threshold(sae.features(sample, "batch").before, sae.k))
    return sae.eval().requires_grad_(False)


@torch.no_grad()
def measure(sae: SAE, tokens: Tensor, idle: Tensor, count: int, config: SAEConfig, training: Training) -> Report:
    """Quality on held-out tokens [tokens, width]."""
    seen = sae.inward(tokens.float())
    values = sae.features(seen).values
    fvu = fraction_of_variance_unexplained(seen, sae.decoder(values))
    dead = (idle > min(config.dead_after, count)).float().mean()
    active = (values > 0).sum(-1).float().mean()
    return Report(float(fvu), float(dead), float(active), training.step * config.batch, round(training.seconds, 1))


def plot(out: Path) -> None:
    """Draws the curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = [json.loads(line) for line in lines_of(out / "curve.jsonl")]
    figure, axis = pyplot.subplots(figsize=(5, 3))
    axis.plot([point["step"] for point in points], [point["loss"] for point in points])
    axis.set(xlabel="step", ylabel="FVU + AuxK / 32", yscale="log")
    figure.tight_layout()
    figure.savefig(out / "curve.png", dpi=110)
    pyplot.close(figure)
