"""Trains the classifier among the judges: on rendered scenes with noise, blur and compression."""

from __future__ import annotations

import io
from dataclasses import replace
from random import Random

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from ...fitting import Loss, Recipe
from ..captions import sample_edit
from ..judges import ClassifierNet, to_batch
from ..scenes import PAIRED, Pixels, Scene, paste, render, sample_scene, sprite
from ..world import BACKGROUNDS, OBJECTS, STYLES

RECIPE = Recipe(lr=2e-3, betas=(0.9, 0.99), warmup=0.05, decay=0.6, ema=0.995, seed=6)


def target_of(scene: Scene) -> Tensor:
    """Objects multi-hot, then background and style as one-hot (the first style: none)."""
    return torch.tensor(
        [float(name in scene.names) for name in OBJECTS]
        + [float(name == scene.background) for name in BACKGROUNDS]
        + [float(style == scene.style) for style in (None, *STYLES)]
    )


def degrade(random: Random, picture: Pixels) -> Pixels:
    """A picture as a generator might leave it: blurred, compressed, noisy."""
    image = Image.fromarray(picture)
    if random.random() < 0.6:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.3)))
    if random.random() < 0.3:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=random.randint(30, 90))
        image = Image.open(buffer)
    noisy = np.asarray(image, dtype=np.float64)
    if random.random() < 0.5:
        noisy = noisy + np.random.default_rng(random.getrandbits(32)).normal(0, random.uniform(1, 12), noisy.shape)
    return np.clip(noisy * random.uniform(0.93, 1.07), 0, 255).astype(np.uint8)


def scrap(random: Random) -> Pixels:
    """Something that resembles no object: a sprite whose patches are shuffled."""
    picture = sprite(random.choice(tuple(OBJECTS)), PAIRED)
    side = 7
    height, width = (picture.shape[0] // side) * side, (picture.shape[1] // side) * side
    tiles = [picture[y : y + side, x : x + side] for y in range(0, height, side) for x in range(0, width, side)]
    random.shuffle(tiles)
    across = width // side
    mixed = np.concatenate([np.concatenate(tiles[i : i + across], axis=1) for i in range(0, len(tiles), across)], axis=0)
    return np.asarray(Image.fromarray(mixed).filter(ImageFilter.GaussianBlur(1.5)))


def sample_picture(random: Random) -> tuple[Pixels, Tensor]:
    """A degraded scene with its target; some scenes have an empty place, and some of those hold scrap."""
    scene = sample_edit(random).source if random.random() < 0.3 else sample_scene(random)
    if random.random() < 0.08:  # a guard may leave nothing at all
        scene = replace(scene, objects=(None, None), style=None)
    picture = render(scene)
    if None in scene.objects and random.random() < 0.7:
        canvas = picture.astype(np.float32)
        piece = scrap(random)
        paste(canvas, piece, 16 + 32 * scene.objects.index(None) - piece.shape[1] // 2, 36 - piece.shape[0] // 2)
        picture = canvas.astype(np.uint8)
    return degrade(random, picture), target_of(scene)


def loss_of(net: ClassifierNet, batch: int = 64) -> Loss:
    """Binary cross-entropy over objects, cross-entropy over backgrounds and styles."""

    def loss(generator: torch.Generator) -> Tensor:
        random = Random(generator.initial_seed())
        pictures, targets = zip(*(sample_picture(random) for _ in range(batch)), strict=True)
        target = torch.stack(targets)
        logits = net(to_batch(list(pictures))).float()
        groups = [len(OBJECTS), len(BACKGROUNDS), 1 + len(STYLES)]
        (objects, backgrounds, styles), wanted = logits.split(groups, dim=1), target.split(groups, dim=1)
        sketch = wanted[2][:, -1]  # a sketch hides its background
        background = (F.cross_entropy(backgrounds, wanted[1].argmax(1), reduction="none") * (1 - sketch)).mean()
        return F.binary_cross_entropy_with_logits(objects, wanted[0]) * 10 + background + F.cross_entropy(styles, wanted[2].argmax(1))

    return loss
