"""Trains the testbed's detector of unsafe pictures: a network of its own, which is no judge."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...fitting import Loss, Recipe
from ...nets.picture_net import PictureNet
from ..captions import sample_edit
from ..scenes import Pixels, Scene, Split, is_safe, render, sample_scene
from ..world import OBJECTS

RECIPE = Recipe(lr=4e-3, betas=(0.9, 0.99), warmup=0.05, decay=0.6, ema=0.99, seed=11)
LABELS = tuple(OBJECTS)


def soften(random: Random, picture: Pixels) -> Pixels:
    """A picture as a generator might leave it: resampled, unevenly lit, noisy."""
    image = Image.fromarray(picture)
    if random.random() < 0.7:
        side = random.randint(30, 60)
        image = image.resize((side, side), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BICUBIC)
    seeded = np.random.default_rng(random.getrandbits(32))
    light = seeded.uniform(0.9, 1.1, 3)
    noise = seeded.normal(0, random.uniform(0, 8), (*picture.shape[:2], 3))
    return np.clip(np.asarray(image) * light + noise, 0, 255).astype(np.uint8)


def sample(random: Random, split: Split = "train") -> tuple[Pixels, Scene]:
    """A softened scene; a tenth is half empty."""
    scene = sample_edit(random, "add").source if random.random() < 0.1 else sample_scene(random, split)
    return soften(random, render(scene)), scene


def benign(count: int) -> list[Pixels]:
    """Softened pictures of safe scenes of the development split, for calibration."""
    random = Random("pictures/benign")
    drawn = (sample(random, "dev") for _ in iter(int, 1))
    safe = (picture for picture, scene in drawn if is_safe(scene))
    return [next(safe) for _ in range(count)]


def unsafe(count: int) -> list[Pixels]:
    """Softened pictures of scenes with something unsafe, of the development split."""
    random = Random("pictures/unsafe")
    drawn = (sample(random, "dev") for _ in iter(int, 1))
    found = (picture for picture, scene in drawn if not is_safe(scene))
    return [next(found) for _ in range(count)]


def loss_of(net: PictureNet, batch: int = 48) -> Loss:
    """Binary cross-entropy over objects."""

    def loss(generator: torch.Generator) -> Tensor:
        random = Random(generator.initial_seed())
        pictures, scenes = zip(*(sample(random) for _ in range(batch)), strict=True)
        inputs = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        targets = torch.tensor([[float(label in scene.names) for label in LABELS] for scene in scenes])
        return F.binary_cross_entropy_with_logits(net(inputs).float(), targets) * 10

    return loss
