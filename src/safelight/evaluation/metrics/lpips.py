"""LPIPS: how different two pictures look."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ... import schema
from ...errors import ArtefactError
from ..case import Estimate
from ..judge import Picture
from ..pictures import checked
from ..pretrained import file_of, hash_of, place_of
from .estimates import mean_over

ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
SMALLEST = 32
"""Pixels; a smaller picture has no fifth layer."""
TAPS = (1, 4, 7, 9, 11)
"""The activations that are compared, by their place in AlexNet's `features`."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(kw_only=True, eq=False)
class Lpips:
    """Distances of pictures, AlexNet version 0.1 of LPIPS (Zhang et al., 2018, https://arxiv.org/abs/1801.03924).

    Σ over layers of the mean over places of w · (φ(x) - φ(y))², φ the channel-normalised activations of an AlexNet trained on ImageNet,
    w ≥ 0 learned from people's judgements. Every library that has it builds its AlexNet by torchvision; here the two files are read
    directly, as tensors only, and a test holds the result against torchmetrics' computation.
    """

    weights: str = ""
    """torchvision's AlexNet: alexnet-owt-7be5be79.pth, or its tensors as .safetensors."""
    heads: str = ""
    """The learned w: alex.pth of LPIPS 0.1; empty: the one that torchmetrics carries."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda …; in 32 bits."""
    batch: Annotated[int, Ge(1)] = 16
    """How many pairs are compared together."""

    def __post_init__(self) -> None:
        schema.check(self)

    @torch.no_grad()
    def __call__(self, first: Sequence[Picture], second: Sequence[Picture]) -> list[float]:
        """A distance per pair, 0 for equal pictures.

        Raises:
            ArtefactError: if weights are missing or damaged.
            ValueError: if there are not as many of each, or the two of a pair differ in size or are smaller than 32 pixels.
        """
        pairs = list(zip(checked(first), checked(second), strict=True))
        for index, (one, other) in enumerate(pairs):
            if one.shape != other.shape or min(one.shape[:2]) < SMALLEST:
                raise ValueError(f"pair {index} is {one.shape} and {other.shape}; LPIPS needs equal sizes of at least {SMALLEST} pixels")
        found: list[float] = []
        for _, alike in itertools.groupby(pairs, key=lambda pair: pair[0].shape):
            run = list(alike)
            found += [distance for start in range(0, len(run), self.batch) for distance in self._compare(run[start : start + self.batch])]
        return found

    def describe(self) -> dict[str, Any]:
        """What a report prints."""
        files = {"weights": self.weights, "heads": self._heads_file()}
        hashes = {name: f"sha256:{hash_of(Path(file))}" if file and Path(file).is_file() else "missing" for name, file in files.items()}
        return {"name": "lpips", "network": "alexnet", "lpips": "0.1", **hashes}

    def _compare(self, pairs: Sequence[tuple[Picture, Picture]]) -> list[float]:
        device, _ = place_of(self.device)
        rows = torch.stack([torch.from_numpy(picture) for pair in pairs for picture in pair]).to(device)
        rows = rows.permute(0, 3, 1, 2).float() / 127.5 - 1  # [2 * pairs, 3, height, width]
        rows = (rows - torch.tensor(SHIFT, device=device)[:, None, None]) / torch.tensor(SCALE, device=device)[:, None, None]
        layers, weights = self._network
        total = torch.zeros(len(pairs), device=device)
        for place, layer in enumerate(layers):
            rows = layer(rows)
            if place in TAPS:
                unit = rows / (rows.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
                total += ((unit[0::2] - unit[1::2]).square() * weights[TAPS.index(place)]).sum(dim=1).mean(dim=(1, 2))
        return [float(distance) for distance in total]

    @cached_property
    def _network(self) -> tuple[list[nn.Module], list[Tensor]]:
        found = read_tensors(self.weights, f"the metric 'lpips' needs torchvision's AlexNet as `weights`; {ALEXNET} (BSD-3-Clause)")
        heads = read_tensors(self._heads_file(), "the metric 'lpips' needs the learned `heads`; `pip install 'safelight[metrics]'`")
        features = alexnet()
        try:
            features.load_state_dict({name.removeprefix("features."): row for name, row in found.items() if name.startswith("features.")})
            weights = [heads[f"lin{index}.model.1.weight"].float().view(1, -1, 1, 1) for index in range(len(TAPS))]
        except (RuntimeError, KeyError) as error:
            raise ArtefactError(f"the weights of 'lpips' are not those of AlexNet and LPIPS 0.1 ({error})") from error
        device, _ = place_of(self.device)
        layers = list(features.eval().requires_grad_(False).to(device).children())
        return layers[: TAPS[-1] + 1], [weight.to(device) for weight in weights]  # the last pooling is for the classifier

    def _heads_file(self) -> str:
        return self.heads or str(file_of("torchmetrics", "functional", "image", "lpips_models", "alex.pth") or "")


def lpips(first: Sequence[Picture], second: Sequence[Picture], network: Lpips, prompts: Sequence[Hashable] | None = None) -> Estimate:
    """Mean distance of pairs, such as unguarded and guarded pictures; interval by bootstrap over prompts (default: a prompt per pair).

    Raises:
        ArtefactError: if weights are missing or damaged.
        ValueError: for no pairs, or where numbers or sizes don't match.
    """
    if len(first) != len(second):
        raise ValueError(f"there are {len(first)} pictures on one side and {len(second)} on the other; LPIPS compares pairs")
    return mean_over(network(first, second), prompts)


def alexnet() -> nn.Sequential:
    """The convolutional part of AlexNet (Krizhevsky, 2014, https://arxiv.org/abs/1404.5997), laid out as torchvision's `features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


def read_tensors(path: str, need: str) -> dict[str, Tensor]:
    """Named tensors from a .safetensors file, or a .pth file that holds nothing but tensors; nothing in it is executed.

    Raises:
        ArtefactError: if the file is missing or holds anything else.
    """
    if not path or not Path(path).is_file():
        raise ArtefactError(f"{need}{f'; there is no file {path}' if path else ''}")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch's safe unpickler raises whatever a damaged or hostile file makes it raise
        raise ArtefactError(f"{path} can't be read as a file of tensors ({error}); {need}") from error
