"""Our SAE training beside a library's, on the same activations, at the same size, learning rate, batches and steps.

    pip install dictionary-learning                         # best in an environment of its own: it has many dependencies
    safelight train safedig weapons substances --pipeline testbed/flux --out dictionaries      # makes the activations
    python benchmarks/sae.py dictionaries/activations --site joint.1:image

Prints, and with `--json` writes: the fraction of variance unexplained and the active features per token on held-out tokens, with each
side's inference threshold; the share of latents that none of the training tokens activates; and tokens per second of training, with what
each side does besides (ours averages weights and writes checkpoints). Runs alternate, and speeds are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from safelight.nets.sae import fraction_of_variance_unexplained
from safelight.training.activations import read_site
from safelight.training.sae_learning import SAEConfig, learn, split, started
from safelight.training.shards import Shards

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """How one training went."""

    fvu: float
    dead: float
    active: float
    tokens_per_second: float


def main() -> None:
    """Trains both, alternately, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", type=Path)
    parser.add_argument("--site", default="joint.1:image")
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shards = Shards.existing(given.activations)
    recorded = read_site(shards, given.site, range(sum(1 for _ in shards.names()))).flatten(0, 2)
    config = SAEConfig(given.expansion, given.k, given.lr, given.batch, given.epochs, dead_after=100_000, revived=64)
    sides = {"safelight": ours, "dictionary_learning": library}
    scores: dict[str, list[Score]] = {name: [] for name in sides}
    for seed in range(given.repeats):
        for name, train in sides.items():
            scores[name].append(train(recorded, replace(config, seed=seed)))
            print(name, seed, scores[name][-1], flush=True)
    print(f"\n{'':<22}{'FVU':>8}{'dead':>8}{'active':>8}{'tokens/s':>10}   (medians of {given.repeats}, {len(recorded)} tokens)")
    for name, found in scores.items():
        fvu, dead, active, speed = (statistics.median(getattr(one, part) for one in found) for part in Score.__dataclass_fields__)
        print(f"{name:<22}{fvu:>8.4f}{dead:>8.2%}{active:>8.1f}{speed:>10.0f}")
    if given.json:
        given.json.write_text(json.dumps({name: [asdict(one) for one in found] for name, found in scores.items()}, indent=2) + "\n")


def ours(recorded: Tensor, config: SAEConfig) -> Score:
    """`safelight.training.sae_learning`, with its checkpoints."""
    train, held_out = split(recorded, config)
    with tempfile.TemporaryDirectory() as folder:
        sae, report = learn(recorded, config, Path(folder))
    inner = (sae.inward(train.float()), sae.inward(held_out.float()))
    return scored(lambda seen: sae.features(seen).values, sae.decoder, inner, report.tokens / report.seconds)


def library(recorded: Tensor, config: SAEConfig) -> Score:
    """`BatchTopKTrainer`, on activations of the same scale."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    train, held_out = split(recorded, config)
    scale = started(train, config).scale
    seen, unseen = train.float() / scale, held_out.float() / scale
    width = seen.shape[1]
    steps = round(config.epochs * len(seen) / config.batch)
    trainer = BatchTopKTrainer(
        steps, width, config.expansion * width, config.k, layer=0, lm_name="", lr=config.lr, warmup_steps=round(0.02 * steps),
        decay_start=round(0.02 * steps) + 1, threshold_start_step=steps // 4, seed=config.seed, device="cpu",
    )  # fmt: skip
    trainer.dead_feature_threshold = config.dead_after
    generator, started_at = torch.Generator().manual_seed(config.seed), time.perf_counter()
    for step in range(steps):
        trainer.update(step, seen[torch.randint(len(seen), (config.batch,), generator=generator)])
    seconds = time.perf_counter() - started_at
    made = trainer.ae.requires_grad_(False)
    return scored(made.encode, made.decode, (seen, unseen), steps * config.batch / seconds)


@torch.no_grad()
def scored(encode: Encode, decode: Encode, tokens: Sequence[Tensor], speed: float) -> Score:
    """The same measures for both: of (training tokens, held-out tokens)."""
    seen, unseen = tokens
    values = encode(unseen)
    fired = torch.stack([(encode(part) > 0).any(0) for part in seen.split(8192)]).any(0)
    fvu = fraction_of_variance_unexplained(unseen, decode(values))
    return Score(float(fvu), float((~fired).float().mean()), float((values > 0).float().sum(-1).mean()), speed)


if __name__ == "__main__":
    main()
