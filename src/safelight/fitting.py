"""The one training loop: budgeted in time or steps, resumable, averaged."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .tables import lines_of

Loss = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Budget:
    """How long to train: `minutes` of wall time, or `steps` if given (reproducible on any machine)."""

    minutes: float = 10.0
    steps: int | None = None

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget that is used up, 0..1."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training."""

    lr: float
    muon_lr: float | None = None  # for the matrices inside blocks; None: AdamW everywhere
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup: float = 0.03  # share of the budget
    decay: float = 0.4  # share of the budget over which the rate falls to `floor`
    floor: float = 0.02
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    bf16: bool = True  # autocast; on a CPU without bf16 units, fp32 is faster

    def rate(self, spent: float) -> float:
        """The factor on the learning rate."""
        rising = min(1.0, (spent + 1e-6) / self.warmup)
        falling = 1.0 if spent < 1 - self.decay else max(self.floor, (1 - spent) / self.decay)
        return rising * falling


class Training:
    """Minimises `loss` over `net` within a budget; `run()` yields progress and may be stopped at any time.

    Checkpoints go to `out/checkpoint.pt` (read back with `weights_only=True`), the loss curve to `out/curve.jsonl`. With a budget of steps,
    an interrupted training that is resumed has the same curve as one that was not.
    """

    def __init__(self, net: nn.Module, loss: Loss, recipe: Recipe, budget: Budget, out: Path, device: str = "cpu") -> None:
        self.net, self.loss, self.recipe, self.budget, self.out, self.device = net, loss, recipe, budget, out, device
        self.optimizers = list(_optimizers(net, recipe))
        self.average = copy.deepcopy(net).requires_grad_(False)
        self.step, self.seconds = 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").is_file():
            self._restore(torch.load(out / "checkpoint.pt", weights_only=True, map_location=device))

    def run(self, every: int = 50, save_seconds: float = 120.0) -> Iterator[dict[str, float]]:
        """Trains; yields `{step, seconds, spent, loss}` each `every` steps."""
        started, saved, total = time.monotonic() - self.seconds, time.monotonic(), 0.0
        while (spent := self.budget.spent(self.step, self.seconds)) < 1:
            total += self._advance(spent)
            self.seconds = time.monotonic() - started
            if self.step % every == 0:
                progress = {"step": self.step, "seconds": round(self.seconds, 1), "spent": spent, "loss": total / every}
                total = 0.0
                with (self.out / "curve.jsonl").open("a") as file:
                    file.write(json.dumps(progress) + "\n")
                if time.monotonic() - saved > save_seconds:
                    self.save()
                    saved = time.monotonic()
                yield progress
        self.save()

    def _advance(self, spent: float) -> float:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        rate = self.recipe.rate(spent)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
        with torch.autocast(self.device, torch.bfloat16, enabled=self.recipe.bf16):
            loss = self.loss(generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.net.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()
        return float(loss.detach())

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - decay)
        for mine, theirs in zip(self.average.buffers(), self.net.buffers(), strict=True):
            mine.copy_(theirs)

    def save(self) -> None:
        """Writes the checkpoint atomically."""
        state = {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")

    def _restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        curve = self.out / "curve.jsonl"
        if curve.is_file():  # what was trained after the checkpoint will be trained again
            kept = [line for line in lines_of(curve) if json.loads(line)["step"] <= self.step]
            curve.write_bytes(b"".join(line + b"\n" for line in kept))


def _optimizers(net: nn.Module, recipe: Recipe) -> Iterator[torch.optim.Optimizer]:
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if recipe.muon_lr and p.ndim == 2 and "blocks" in name and "norm" not in name]
    chosen = set(map(id, matrices))
    if matrices:
        yield torch.optim.Muon(
            [{"params": matrices, "base_lr": recipe.muon_lr}], lr=recipe.muon_lr or 0, weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
    others = [p for _, p in trained if id(p) not in chosen]
    yield torch.optim.AdamW([{"params": others, "base_lr": recipe.lr}], lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
