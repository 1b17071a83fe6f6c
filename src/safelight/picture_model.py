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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .calibration import Calibration
from .errors import ArtefactError
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
        partial = Path(path).with_name(f"{Path(path).name}.partial")
        tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        try:
            save_file(tensors, partial, {"format": FORMAT, "facts": json.dumps(facts)})
        except SafetensorError as error:
            raise OSError(f"{path} can't be written: {error}") from error
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> PictureModel:
        """Reads a model.

        Raises:
            ArtefactError: if the file is missing, damaged, or holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path} can't be read as a model of pictures ({error}); {REMEDY}") from error
        if metadata.get("format") != FORMAT:
            raise ArtefactError(f"{path} holds no model of pictures ({FORMAT}) but {metadata.get('format', 'something else')!r}; {REMEDY}")
        try:
            facts = json.loads(metadata["facts"])
            net = PictureNet(**facts["settings"])
            net.load_state_dict(tensors)
            calibration = Calibration(**facts["calibration"]) if facts["calibration"] else None
            made = cls(net.eval().requires_grad_(False), tuple(facts["labels"]), tuple(facts["unsafe"]), int(facts["size"]), calibration)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ArtefactError(f"{path} lacks a part of a model of pictures, or has one too many ({first}); {REMEDY}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ArtefactError(f"{path} contains NaN or infinite weights; {REMEDY}")
        return made
