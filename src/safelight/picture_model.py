"""A small trained network with the labels that it knows: what a detector of pictures looks with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .calibration import Calibration
from .errors import ArtefactError
from .files import read_tensors, write_tensors
from .nets.picture_net import PictureNet

FORMAT = "safelight-pictures/1"
REMEDY = "name a model from transformers instead (`image_classifier.pretrained`), or for the testbed reinstall the package"
Picture = NDArray[np.uint8]
"""[height, width, 3]"""


@dataclass(frozen=True)
class PictureModel:
    """Tells how likely each of its labels is in a picture; several may be."""

    net: PictureNet = field(repr=False)
    labels: tuple[str, ...]
    unsafe: tuple[str, ...]
    """The labels that its calibration counts as unsafe."""
    size: int
    """Pixels of a side; other pictures are resized."""
    calibration: Calibration | None = None
    """Of the highest score of `unsafe`, on benign pictures."""

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Probabilities, [batch, labels]."""
        inputs = torch.from_numpy(np.stack([self._fitted(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([self.net(part).sigmoid() for part in inputs.split(64)])

    def _fitted(self, picture: Picture) -> Picture:
        if picture.shape[:2] == (self.size, self.size):
            return picture
        return np.asarray(Image.fromarray(picture).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file in half precision, atomically."""
        facts: dict[str, Any] = {
            "labels": self.labels, "unsafe": self.unsafe, "size": self.size, "settings": self.net.settings,
            "calibration": asdict(self.calibration) if self.calibration else None,
        }  # fmt: skip
        write_tensors(path, FORMAT, {name: tensor.half() for name, tensor in self.net.state_dict().items()}, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> PictureModel:
        """Reads a model.

        Raises:
            ArtefactError: if the file is missing, damaged, or holds something else.
        """
        metadata, tensors = read_tensors(path, "a model of pictures", FORMAT, REMEDY)
        facts = metadata.parsed("facts")
        facts.only(("labels", "unsafe", "size", "settings", "calibration"))
        labels, unsafe = facts.texts("labels"), facts.texts("unsafe")
        if len(set(labels)) < len(labels) or not set(unsafe) <= set(labels):
            raise facts.error("names labels twice, or unsafe ones that it doesn't have")
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        try:
            with torch.device("meta"):  # nothing is allocated before the tensors are known to fit
                PictureNet(**facts.sizes("settings")).load_state_dict(weights, assign=True)
            net = PictureNet(**facts.sizes("settings"))
            net.load_state_dict(weights)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError, IndexError) as error:
            if isinstance(error, ArtefactError):
                raise
            first = str(error).strip().splitlines()[0]
            raise ArtefactError(f"{path} lacks a part of a model of pictures, or has one too many ({first}); {REMEDY}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise ArtefactError(f"{path} contains NaN or infinite weights; {REMEDY}")
        made = cls(net.eval().requires_grad_(False), labels, unsafe, facts.integer("size", 1, 4096), Calibration.read(facts))
        try:
            probabilities = made([np.zeros((made.size, made.size, 3), dtype=np.uint8)])
        except RuntimeError as error:
            raise ArtefactError(
                f"{path} has a size that its network can't take ({str(error).strip().splitlines()[0]}); {REMEDY}"
            ) from error
        if probabilities.shape[1] != len(labels):
            raise ArtefactError(f"{path} has {len(labels)} labels for a network that tells {probabilities.shape[1]} apart; {REMEDY}")
        metadata.settle()
        return made
