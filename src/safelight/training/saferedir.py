"""Redirectors for SafeRedir: trained on the trajectories of prompt pairs, calibrated on those of benign prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..anchors import sampled
from ..backbone import Backbone
from ..calibration import Calibration
from ..errors import ArtefactError
from ..fitting import Budget, Recipe, Training
from ..generator import Generator
from ..nets.official_redirector import OfficialRedirector
from ..nets.redirector import Redirector as Network
from ..redirector import Redirector, rounded
from ..testbed.scenes import Pixels
from .examples import Example
from .prompt_pairs import Prompts, check, split_families
from .redirector_learning import Config, Learning, Records, redirected, visible
from .trajectories import record

Progress = Callable[[str, int, int], None]


def examples(prompts: Prompts, seeds: int) -> list[Example]:
    """What to record: for each pair the unsafe member under each seed, then the safe one under the same; then benign prompts."""
    found: list[Example] = []
    pictures: Sequence[Pixels | None] = prompts.pictures or [None] * (len(prompts.pairs) + len(prompts.benign))
    for number, (pair, picture) in enumerate(zip(prompts.pairs, pictures, strict=False)):
        for text, concept in ((pair.unsafe, pair.category), (pair.safe, None)):
            found += [Example(text, 100_000 + number * seeds + seed, concept, image=picture) for seed in range(seeds)]
    loose = zip(prompts.benign, pictures[len(prompts.pairs) :], strict=True)
    return found + [Example(text, 500_000 + number, image=picture) for number, (text, picture) in enumerate(loose)]


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
    channels, width = records.latents.shape[2], records.text.shape[2]
    pooled = 0 if records.pooled is None else records.pooled.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.architecture == "official":
            return OfficialRedirector(channels, width, records.text.shape[1])
        return Network(channels, width, pooled, width=config.width, rank=config.rank)


def fit(
    records: Records, prompts: Prompts, config: Config, out: Path, progress: Progress = lambda *_: None, device: str = "cpu"
) -> Trained:  # fmt: skip
    """Trains a network with early stopping on held-out families; resumable, and the same whether interrupted or not."""
    train, held_out = split(records, prompts, config)
    net = network(records, config).to(device)
    learning = Learning(net, records, train, config, device)
    recipe = Recipe(config.lr, weight_decay=config.weight_decay, ema=0.995, seed=config.seed, bf16=False, betas=(0.9, 0.98))
    training = Training(net, learning.loss, recipe, Budget(steps=config.epochs * learning.epoch), out, device)
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
    return Trained(net.cpu().eval(), curve, curve[best]["accuracy"], best + 1)


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
    device = next(net.parameters()).device
    right, entropy, distance, count, moved_count = 0.0, 0.0, 0.0, 0, 0
    for rows in chosen.split(64):
        for step in range(0, records.latents.shape[1], 2):
            text, pooled = records.text[rows], None if records.pooled is None else records.pooled[rows]
            given = visible(records.latents[rows, step].float(), text, records.times[rows, step], pooled, config.inputs)
            logits, aim = (part.to("cpu") for part in net(*(None if part is None else part.to(device) for part in given)))
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
        save_file({name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}, out / "best.safetensors")
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
    own = risks(net, unsafe, config)[:, 0]  # a prompt should be found in the first step
    weakest = float(own.quantile(0.05))
    calibration = Calibration.fit(peaks.tolist(), config.target_fpr, items=prompts).towards(weakest, config.margin, peaks.tolist())
    recall = float((own > calibration.threshold).float().mean())
    if recall < 0.5:
        raise ValueError(
            f"the threshold {calibration.threshold:.3g}, which {config.target_fpr:.0%} of benign generations may exceed, is exceeded by only {recall:.0%} "
            "of unsafe prompts; give more pairs, or allow more false positives"
        )
    model = {"denoiser": type(backbone.module).__name__, "latent_scale": backbone.latent_scale}
    made = Redirector(net, concept, calibration.threshold, calibration, model)
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


@dataclass(frozen=True)
class Gathered:
    """All that a training needs of a pipeline."""

    prompts: Prompts
    """Those that are trained on."""
    records: Records
    benign: Records
    """Of the prompts that calibrate the threshold."""
    held_out: Sequence[str]
    """Those prompts."""
    backbone: Backbone


def gather(
    generator: Generator, prompts: Prompts, config: Config, out: Path, calibrating: int, progress: Progress = lambda *_: None
) -> Gathered:  # fmt: skip
    """Records trajectories; what is in `out` already is not made again. Under `accelerate launch`, processes share the work.

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
    backbone = Backbone.of(generator.pipe)
    claim(out, config, prompts, backbone, generator.settings)
    known, kept = prompts.keep(slice(None, -calibrating)), prompts.keep(slice(-calibrating, None), pairs=False)
    records = recorded(generator, known, config.seeds, out / "trajectories", progress)
    benign = recorded(generator, kept, 1, out / "benign-trajectories", progress)
    return Gathered(known, records, benign, kept.benign, backbone)


def learn(
    gathered: Gathered, concept: str, config: Config, out: Path, progress: Progress = lambda *_: None, device: str = "cpu"
) -> tuple[Redirector, dict[str, Any]]:  # fmt: skip
    """Trains a redirector and calibrates it; writes curves and a report into `out`."""
    started, records = time.monotonic(), gathered.records
    trained = fit(records, gathered.prompts, config, out / "fit", progress, device)
    _, families = split(records, gathered.prompts, config)
    unsafe = subset(records, families[records.unsafe[families]])
    redirector, quality = calibrate(trained, concept, gathered.backbone, gathered.benign, unsafe, config, gathered.held_out)
    with suppress(ImportError):  # plots are an extra
        plot(trained, out / "curves.png")
    report = quality | {
        "concept": concept, "threshold": redirector.threshold, "accuracy": trained.accuracy, "best_epoch": trained.stopped,
        "epochs": len(trained.curve), "parameters": sum(parameter.numel() for parameter in trained.net.parameters()),
        "pairs": len(gathered.prompts.pairs), "pictures": len(records.latents) + len(gathered.benign.latents),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(report | {"curve": trained.curve}, indent=2) + "\n")
    return redirector, report


def recorded(generator: Generator, prompts: Prompts, seeds: int, out: Path, progress: Progress = lambda *_: None) -> Records:
    """The trajectories of all prompts."""
    chosen = examples(prompts, seeds)
    return Records.load(record(generator, chosen, out, progress=progress), len(prompts.pairs), seeds, len(chosen))


def claim(out: Path, config: Config, prompts: Prompts, backbone: Backbone, settings: Mapping[str, Any]) -> None:
    """Makes sure that a folder holds one training only.

    Raises:
        ArtefactError: if it holds another one.
    """
    out.mkdir(parents=True, exist_ok=True)
    identity = {
        "config": asdict(config), "pairs": [list(pair) for pair in prompts.pairs], "benign": list(prompts.benign),
        "settings": {name: str(value) for name, value in settings.items()}, "denoiser": type(backbone.module).__name__,
        "weights": sampled(next(backbone.module.parameters())),
    }  # fmt: skip
    file, wanted = out / "training.json", json.dumps(identity, sort_keys=True)
    if file.is_file() and file.read_text() != wanted:
        raise ArtefactError(
            f"{out} holds a training of another model, or with other prompts or settings (see {file}); choose another folder, or remove this one"
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
