"""A pipeline with the call arguments of a protocol: batches of requests, one seed each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image


class Request(Protocol):
    """What is asked of a pipeline."""

    @property
    def prompt(self) -> str:
        """The prompt, or the instruction."""
        ...

    @property
    def seed(self) -> int:
        """The random seed."""
        ...

    @property
    def image(self) -> NDArray[np.uint8] | None:
        """What to edit, [height, width, 3]."""
        ...


@dataclass(frozen=True)
class Generator:
    """A pipeline with the call arguments of a protocol."""

    pipe: Any
    settings: Mapping[str, Any]

    def __call__(self, requests: Sequence[Request]) -> NDArray[np.float32]:
        """Images [batch, height, width, 3] in 0..1, one seed per request: a row doesn't depend on its batch."""
        arguments: dict[str, Any] = dict(self.settings)
        if isinstance(arguments.get("negative_prompt"), str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(requests)
        if requests[0].image is not None:
            arguments["image"] = [Image.fromarray(request.image) for request in requests if request.image is not None]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        arguments.setdefault("output_type", "np")
        output = self.pipe(prompt=[request.prompt for request in requests], generator=generators, **arguments)
        return np.asarray(output.images)


def as_bytes(image: Any) -> NDArray[np.uint8]:
    """A picture [height, width, 3] in 0..1, as bytes."""
    return (np.asarray(image) * 255).round().clip(0, 255).astype(np.uint8)
