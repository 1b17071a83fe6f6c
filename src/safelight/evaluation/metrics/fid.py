"""FID: how far a set of pictures is from another, in Inception's features."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from ... import schema
from ...errors import ArtefactError
from ..case import Estimate
from ..judge import Picture
from ..pictures import checked
from ..pretrained import hash_of, place_of
from .estimates import bootstrap, groups
from .quality import distance

SOURCE = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
SIDE = 299
DRAWS = 20
"""Resamples behind an interval: each is an eigendecomposition of 2048 x 2048."""


class Extractor(Protocol):
    """What turns pictures into features, and can say what it is."""

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Features, [pictures, width]."""

    def describe(self) -> dict[str, Any]:
        """What a report prints."""


@dataclass(kw_only=True, eq=False)
class Inception:
    """The Inception v3 of 2015 that FID is defined by (Heusel et al., 2017, https://arxiv.org/abs/1706.08500), as TorchScript.

    Pictures are resized as clean-fid does (Parmar et al., 2022, https://arxiv.org/abs/2104.11222): bicubic with anti-aliasing, without
    rounding. A TorchScript file is a program, not only numbers: take it from its publisher, and pin it by its hash.
    """

    weights: str = ""
    """The file inception-2015-12-05.pt."""
    sha256: str = ""
    """What the file's SHA-256 begins with, at least 12 digits; a file with another one is refused before it is read. Empty: any."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda …; in 32 bits."""
    batch: Annotated[int, Ge(1)] = 16
    """How many pictures are looked at together."""

    def __post_init__(self) -> None:
        if self.sha256 and (len(self.sha256) < 12 or set(self.sha256) - set("0123456789abcdef")):
            raise ValueError(f"sha256={self.sha256!r} should be at least 12 hexadecimal digits in lower case")
        schema.check(self)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Features of the last pooling layer, [pictures, 2048].

        Raises:
            ArtefactError: if the file is missing, another one, or damaged.
            ValueError: if one is not a picture.
        """
        rows, device = checked(pictures), place_of(self.device)[0]
        found = []
        for start in range(0, len(rows), self.batch):
            resized = torch.from_numpy(np.stack([resize(row) for row in rows[start : start + self.batch]]))
            inputs = (resized.permute(0, 3, 1, 2).to(device) - 128) / 128
            found.append(self._network.layers(inputs).flatten(1).float().cpu())
        return torch.cat(found) if found else torch.empty(0, 2048)

    def describe(self) -> dict[str, Any]:
        """What a report prints."""
        file = Path(self.weights)
        return {"name": "inception-2015-12-05", "resize": "clean", "weights": f"sha256:{hash_of(file)}" if file.is_file() else "missing"}

    @cached_property
    def _network(self) -> Any:
        if not self.weights or not Path(self.weights).is_file():
            missing = f"; there is no file {self.weights}" if self.weights else ""
            raise ArtefactError(f"FID needs Inception's weights (96 MB) as `weights`: {SOURCE}{missing}")
        program = Path(self.weights).read_bytes()
        if not (found := hashlib.sha256(program).hexdigest()).startswith(self.sha256):
            raise ArtefactError(f"{self.weights} has the SHA-256 {found}, not {self.sha256}…: it is not the file that was asked for")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is on its way out; this file exists in no other form
                network = torch.jit.load(self.weights, map_location=place_of(self.device)[0]).eval()
            _ = network.layers
        except (RuntimeError, AttributeError) as error:
            raise ArtefactError(f"{self.weights} is not {Path(SOURCE).name} ({type(error).__name__}); get it from {SOURCE}") from error
        return network


def fid(
    base: Sequence[Picture], guarded: Sequence[Picture], extractor: Extractor, prompts: Sequence[Hashable] | None = None, draws: int = DRAWS
) -> Estimate:
    """Fréchet distance of two sets of pictures of the same prompts; biased upwards for few pictures. Interval by bootstrap over prompts.

    Raises:
        ArtefactError: if the extractor's weights are missing.
        ValueError: if there are fewer than two pictures, or numbers don't match.
    """
    if len(base) != len(guarded) or len(base) < 2:
        raise ValueError(f"there are {len(base)} and {len(guarded)} pictures; FID needs as many on each side, and at least two")
    first, second = (extractor(pictures).double().numpy() for pictures in (base, guarded))
    parts = groups(len(base), prompts)

    def drawn(table: NDArray[Any]) -> float:
        taken = [index for part in table[:, 0] for index in parts[int(part)]]
        return distance(first[taken], second[taken])

    return bootstrap([(float(index),) for index in range(len(parts))], drawn, draws=draws)


def resize(picture: Picture) -> NDArray[np.float32]:
    """[height, width, 3] -> [299, 299, 3], each channel in floating point."""
    from PIL import Image

    channels = [
        Image.fromarray(picture[..., index].astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for index in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)
