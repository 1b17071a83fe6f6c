"""The stages that make the bundled weights, in order; each is one command, resumable, on CPU or GPU."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...attach import Guard
from ...bank import Bank
from ...detectors.image_classifier import ImageClassifier
from ...detectors.neighbours import Neighbours
from ...fitting import Budget, Loss, Recipe, Training
from ...nets.picture_net import PictureNet
from ...picture_model import PictureModel
from ...redirector import rounded
from ...run import Run
from ...safe_guidance import token_shifts
from ...tables import lines_of
from .. import architectures
from ..captions import edit_split, sample_caption, sample_edit
from ..judges import ClassifierNet
from ..pairs import instruction_pairs, safe_captions, safe_instructions, scene_pairs
from ..pipelines import load
from ..scenes import SIZE, is_safe, sample_scene
from ..world import OBJECTS, SAFE, UNSAFE
from . import classifier, flux, pictures, sd, sd3, text, vae
from .latents import Latents, Prompts
from .sprites import draw_atlas

SCENES, EDITS = 16_000, 8_000
BANKS = {"sd": (1000, 1024), "sd3": (400, 768), "flux": (1000, 1024), "kontext": (336, 768)}
"""Pipeline -> pairs and token shifts of its bank; SD3's embeddings are twice as wide, and what ships must be small."""
Saved = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """One training: a network, its loss, its recipe, a budget that was found to do, and what of it is kept."""

    recipe: Recipe
    budget: Budget
    prepare: Callable[[Path, str], tuple[nn.Module, Loss]]
    export: Callable[[Any], dict[str, Saved]]
    finish: Callable[[Any, Path], None] | None = None
    """Writes what is kept in a format of its own."""


def _plain(name: str) -> Callable[[nn.Module], dict[str, Saved]]:
    return lambda net: {name: _half(net)}


def _half(net: nn.Module) -> Saved:
    return {key: value.half().contiguous() for key, value in net.state_dict().items()}


def _export_vae(net: Any) -> dict[str, Saved]:
    vae.normalise(net.eval(), vae.sample_pictures(Random(99), 512).to(net.device))
    return {"vae": _half(net)}


def _export_text(net: Any) -> dict[str, Saved]:
    t5 = _half(net.t5)
    t5.pop("encoder.embed_tokens.weight", None)  # tied to `shared.weight`
    return {"t5": t5, "clip": _half(net.clip)}


def _read(weights: Path, name: str, net: nn.Module, device: str) -> nn.Module:
    file = weights / f"{name}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; train the stage that makes it first (order: {', '.join(STAGES)})")
    net.load_state_dict({key: value.float() for key, value in load_file(file).items()}, strict=False)
    return net.eval().requires_grad_(False).to(device)


def _corpus(weights: Path, device: str) -> tuple[Latents, Prompts]:
    encoder: Any = _read(weights, "vae", architectures.autoencoder(), device)
    prompts = Prompts(_read(weights, "t5", architectures.t5(), device), _read(weights, "clip", architectures.clip(), device))
    return Latents(encoder, weights / "corpus", SCENES, EDITS), prompts


def _prepare_vae(_: Path, device: str) -> tuple[nn.Module, Loss]:
    net = architectures.autoencoder().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, vae.loss_of(net)


def _prepare_text(_: Path, device: str) -> tuple[nn.Module, Loss]:
    net = text.Parser()
    return net, text.loss_of(net)


def _prepare_classifier(_: Path, device: str) -> tuple[nn.Module, Loss]:
    net = ClassifierNet()
    return net, classifier.loss_of(net)


def _prepare_pictures(_: Path, device: str) -> tuple[nn.Module, Loss]:
    net = PictureNet(len(OBJECTS))
    return net, pictures.loss_of(net)


def _store_pictures(net: Any, weights: Path) -> None:
    """The detector of unsafe pictures, calibrated on safe scenes; its threshold is then moved half-way to what it says of unsafe ones."""
    model = PictureModel(rounded(net.cpu()), tuple(OBJECTS), UNSAFE, SIZE)
    benign, detector = pictures.benign(1000), ImageClassifier(model=model)
    calibration = detector.calibrate(benign, target_fpr=0.01)
    weakest = float(detector(pictures.unsafe(500)).quantile(0.05))
    replace(model, calibration=calibration.towards(weakest, 0.5, detector(benign).tolist())).save(weights / "pictures.safetensors")


def _prepare_sd(weights: Path, device: str) -> tuple[nn.Module, Loss]:
    data, prompts = _corpus(weights, device)
    net = architectures.unet().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, sd.loss_of(net, prompts, data, device=device)


def _prepare_flux(weights: Path, device: str) -> tuple[nn.Module, Loss]:
    data, prompts = _corpus(weights, device)
    net = architectures.flux().to(device)
    return net, flux.loss_of(net, prompts, data, device=device)


def _prepare_sd3(weights: Path, device: str) -> tuple[nn.Module, Loss]:
    data, prompts = _corpus(weights, device)
    net = architectures.sd3().to(device)
    return net, sd3.loss_of(net, prompts, data, device=device)


STAGES: dict[str, Stage] = {
    "vae": Stage(vae.RECIPE, Budget(steps=1600), _prepare_vae, _export_vae),
    "text": Stage(text.RECIPE, Budget(steps=1500), _prepare_text, _export_text),
    "classifier": Stage(classifier.RECIPE, Budget(steps=1200), _prepare_classifier, _plain("classifier")),
    "pictures": Stage(pictures.RECIPE, Budget(steps=1200), _prepare_pictures, lambda net: {}, _store_pictures),
    "sd": Stage(sd.RECIPE, Budget(minutes=55), _prepare_sd, _plain("unet")),
    "flux": Stage(flux.RECIPE, Budget(minutes=85), _prepare_flux, _plain("flux")),
    "sd3": Stage(sd3.RECIPE, Budget(minutes=70), _prepare_sd3, _plain("sd3")),
}


def train(name: str, weights: Path, budget: Budget | None = None, device: str = "cpu", bf16: bool = True) -> Iterator[dict[str, float]]:
    """Trains one stage, yielding progress; at the end its weights and a line of provenance lie in `weights`.

    Raises:
        ValueError: if there is no such stage.
        FileNotFoundError: if an earlier stage's weights, or the emoji font, are missing.
    """
    if name == "sprites":
        (weights / "sprites.png").parent.mkdir(parents=True, exist_ok=True)
        draw_atlas().save(weights / "sprites.png", optimize=True)
        return
    if name == "banks":
        make_banks(weights)
        return
    if name not in STAGES:
        raise ValueError(f"there is no stage {name!r}; there are sprites, {', '.join(STAGES)}, banks")
    stage = STAGES[name]
    recipe = replace(stage.recipe, bf16=stage.recipe.bf16 and bf16)
    torch.manual_seed(0)
    net, loss = stage.prepare(weights, device)
    training = Training(net, loss, recipe, budget or stage.budget, weights / "training" / name, device)
    yield from training.run()
    for file, tensors in stage.export(training.average).items():
        save_file(tensors, weights / f"{file}.safetensors")
    if stage.finish is not None:
        stage.finish(training.average.eval(), weights)
    _note(weights, name, training, recipe)


def _note(weights: Path, name: str, training: Training, recipe: Recipe) -> None:
    file = weights / "provenance.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[name] = {
        "command": f"safelight testbed train {name} --out weights",
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "recipe": asdict(recipe),
        "curve": thinned_curve(training.out),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    file.write_text(json.dumps(known, indent=2) + "\n")


def thinned_curve(out: Path, points: int = 24) -> list[tuple[int, float]]:
    """(step, loss) at evenly spread steps of a training."""
    rows = [json.loads(line) for line in lines_of(out / "curve.jsonl")]
    chosen = rows[:: max(1, len(rows) // points)]
    return [(row["step"], round(row["loss"], 5)) for row in chosen]


def make_banks(weights: Path) -> None:
    """The banks of the testbed's pipelines: detection entries and token shifts, calibrated on held-out benign prompts."""
    for kind, (pairs, tokens) in BANKS.items():
        random = Random(f"bank/{kind}")
        pipe = load(kind, weights)
        run = Run(Guard(pipe, (), "accept").backbone, pipe.encode_prompt, None)
        if kind == "kontext":
            known, benign, held_out = instruction_pairs()[:pairs], safe_instructions(), calibration_instructions(random, 1000)
        else:
            known, benign, held_out = scene_pairs(random, pairs), safe_captions(random, 1000), calibration_captions(random, 1000)
        random.shuffle(known)
        bank = Bank.build(run.pool, known, benign, metric="discriminant").with_shifts(*token_shifts(run, known, tokens))
        calibration = Neighbours(bank=bank, encoder=run.pool).calibrate(held_out, target_fpr=0.01)
        replace(bank, calibration=calibration).save(weights / f"bank-{kind}.safetensors")


def calibration_captions(random: Random, count: int) -> list[str]:
    """Captions of safe scenes of the development split, in plain names."""
    prompts: list[str] = []
    while len(prompts) < count:
        scene = sample_scene(random, "dev")
        if is_safe(scene):
            prompts.append(sample_caption(random, scene, synonyms=0.0))
    return prompts


def calibration_instructions(random: Random, count: int) -> list[str]:
    """Instructions of the development split that bring in nothing unsafe, in plain names."""
    prompts: list[str] = []
    while len(prompts) < count:
        edit = sample_edit(random, synonyms=0.0)
        if edit_split(edit) == "dev" and all(name in SAFE for name in edit.target.names if name not in edit.source.names):
            prompts.append(edit.instruction)
    return prompts
