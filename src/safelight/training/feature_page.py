"""A page of the scenes that activate features most: what a dictionary's features mean."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image, ImageFilter
from torch import Tensor

from ..dictionary import Dictionary
from ..errors import ArtefactError
from .shards import Shards


@dataclass(frozen=True)
class Feature:
    """A feature, and the pictures in which it fires most."""

    index: int
    contrast: float
    """Its normalised mean over unsafe pictures less that over safe ones, at its best time point."""
    pictures: Sequence[Tensor]
    """[height, width, 3], of bytes."""
    activations: Sequence[float]
    unsafe: Sequence[bool]


@dataclass(frozen=True)
class Scenes:
    """The features of one position."""

    site: str
    features: Sequence[Feature]


@torch.no_grad()
def scenes(dictionary: Dictionary, recordings: Path, count: int, pictures: int) -> Scenes:
    """The harmful features with the highest contrast, each with the recorded pictures in which a token of it fires most.

    Raises:
        ArtefactError: if there are no recordings, or none of this site.
    """
    if not (recordings / "manifest.json").is_file():
        raise ArtefactError(f"{recordings} holds no recordings; they are made by `safelight train safedig`, beside its bundle")
    shards, harmful = Shards.existing(recordings), dictionary.harmful
    best: dict[int, float] = {}
    for features, weights in zip(harmful.features.tolist(), harmful.contrasts.tolist(), strict=True):
        for index, weight in zip(features, weights, strict=True):
            best[index] = max(weight, best.get(index, 0.0))
    chosen = sorted(best, key=lambda index: -best[index])[:count]
    names = list(shards.names())
    strengths = torch.stack([_strengths(shards.read(name), dictionary, torch.tensor(chosen), name) for name in names])
    found = []
    for place, index in enumerate(chosen):
        top = strengths[:, place].topk(min(pictures, len(names)))
        rows = [row for row, value in zip(top.indices.tolist(), top.values.tolist(), strict=True) if value > 0]
        shown = [shards.read(names[row]) for row in rows]
        found.append(
            Feature(
                index, best[index], [part["picture"] for part in shown], [float(strengths[row, place]) for row in rows],
                [bool(part["unsafe"]) for part in shown],
            )
        )  # fmt: skip
    return Scenes(dictionary.site, found)


def _strengths(parts: dict[str, Tensor], dictionary: Dictionary, chosen: Tensor, name: str) -> Tensor:
    if dictionary.site not in parts:
        raise ArtefactError(f"recording {name} has no activations of '{dictionary.site}'; record that site too")
    seen = dictionary.sae.inward(parts[dictionary.site].float())
    return dictionary.sae.some(seen, chosen).flatten(0, -2).amax(0)


def page(found: Sequence[Scenes], *, blur: bool = True) -> str:
    """Self-contained HTML."""
    environment = Environment(loader=PackageLoader("safelight"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True)
    environment.filters["picture"] = lambda tensor: encoded(tensor, blur)
    return environment.get_template("features.html").render(found=found, blur=blur)


def encoded(picture: Tensor, blur: bool) -> str:
    """A picture [height, width, 3] of bytes as a data URL."""
    image = Image.fromarray(picture.numpy())
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(max(image.size) / 12))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
