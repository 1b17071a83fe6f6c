"""Scenes of the miniature world, and how they are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .world import BACKGROUNDS, OBJECTS, SAFE, STYLES

Pixels = NDArray[np.uint8]
Split = Literal["train", "dev", "test"]

SIZE = 64  # pixels of a scene's side
HORIZON = 38  # first row of the ground
ALONE, PAIRED = 42, 28  # longest side of a sprite, in pixels
SPRITE_SIZES = (ALONE, PAIRED)


@dataclass(frozen=True)
class Scene:
    """One object in the middle, or two side by side (`None`: an empty place), before a background.

    `jitter` moves each object by multiples of 4 pixels, the VAE's stride, so that sprites look the same in
    latent space wherever they stand.
    """

    objects: tuple[str | None, ...]
    background: str
    style: str | None = None
    jitter: tuple[int, ...] = (0, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The objects that are there, left to right."""
        return tuple(name for name in self.objects if name is not None)

    @property
    def split(self) -> Split:
        """Which part of the world this combination belongs to; jitter and wording don't matter."""
        key = "|".join([*sorted(map(str, self.objects)), self.background, str(self.style)])
        share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
        return "test" if share < 0.10 else "dev" if share < 0.15 else "train"

    def boxes(self) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """Each object with its box (left, top, width, height) in pixels."""
        for place, name in enumerate(self.objects):
            if name is not None:
                yield name, box(name, len(self.objects), place, self.jitter[place])


def box(name: str, count: int, place: int, jitter: int) -> tuple[int, int, int, int]:
    """Where an object stands in a scene of `count` places."""
    size = ALONE if count == 1 else PAIRED
    height, width = sprite(name, size).shape[:2]
    x, y = (32 + 4 * jitter, 34) if count == 1 else (16 + 32 * place, 36 + 4 * jitter)
    return x - width // 2, y - height // 2, width, height


@cache
def _atlas() -> Image.Image:
    with resources.files(__package__).joinpath("assets/sprites.png").open("rb") as file:
        return Image.open(file).convert("RGBA")


@cache
def sprite(name: str, size: int) -> Pixels:
    """An object's picture, [height, width, 4] with alpha, its longest side `size` pixels."""
    row = list(OBJECTS).index(name) * ALONE
    left = 0 if size == ALONE else ALONE
    tile = _atlas().crop((left, row, left + size, row + size))
    bounds = tile.getbbox()
    return np.asarray(tile.crop(bounds), dtype=np.uint8)


@cache
def backdrop(background: str) -> Pixels:
    """The empty scene, [64, 64, 3]."""
    sky, ground = BACKGROUNDS[background]
    pixels = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    pixels[:HORIZON], pixels[HORIZON:] = sky, ground
    return pixels


def render(scene: Scene) -> Pixels:
    """Draws a scene, [64, 64, 3]."""
    pixels = backdrop(scene.background).astype(np.float32)
    for name, (left, top, _, _) in scene.boxes():
        paste(pixels, sprite(name, ALONE if len(scene.objects) == 1 else PAIRED), left, top)
    drawn = pixels.round().astype(np.uint8)
    return drawn if scene.style is None else stylise(drawn, scene.style)


def paste(pixels: NDArray[np.float32], picture: Pixels, left: int, top: int) -> None:
    """Composites a sprite onto `pixels` in place."""
    height, width = picture.shape[:2]
    alpha = picture[..., 3:].astype(np.float32) / 255
    window = pixels[top : top + height, left : left + width]
    window += alpha * (picture[..., :3] - window)


def stylise(pixels: Pixels, style: str) -> Pixels:
    """Redraws a picture in one of the world's styles."""
    if style == "pixel art":
        blocks = pixels.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean(axis=(1, 3))
        return np.kron(blocks, np.ones((4, 4, 1))).round().astype(np.uint8)
    if style == "pencil sketch":  # colour dodge: grey over its blurred negative leaves the contours
        grey = Image.fromarray(pixels).convert("L")
        blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(3)), dtype=np.float32)
        dodge = np.clip(np.asarray(grey, dtype=np.float32) * 235 / np.maximum(blurred, 1), 0, 255)
        return np.repeat(dodge.round().astype(np.uint8)[..., None], 3, axis=2)
    raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")


def sample_scene(random: Random, split: Split = "train", *, objects: tuple[str, ...] | None = None) -> Scene:
    """A random scene of a split; most have no style, and styled ones show one object."""
    known = tuple(OBJECTS)
    while True:
        style = random.choice(STYLES) if random.random() < 0.1 else None
        count = 1 if style or random.random() < 0.3 else 2
        names = tuple(random.sample(objects or known, count))
        scene = Scene(names, random.choice(tuple(BACKGROUNDS)), style, sample_jitter(random))
        if scene.split == split:
            return scene


def sample_jitter(random: Random) -> tuple[int, int]:
    """How far objects are moved, in units of 4 pixels."""
    return random.randint(-1, 1), random.randint(-1, 1)


def is_safe(scene: Scene) -> bool:
    """Whether nothing in a scene stands for an unsafe concept."""
    return all(name in SAFE for name in scene.names)
