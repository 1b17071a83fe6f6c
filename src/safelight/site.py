"""Addresses of activations inside a denoiser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Stream = Literal["text", "image", "reference"]

_ADDRESS = re.compile(rf"([a-z]+)(?:\.(\d+))?(?:\.([a-z]+))?(?::({'|'.join(get_args(Stream))}))?")


@dataclass(frozen=True)
class Site:
    """An address: `joint.3:image` is a residual stream, `joint.3.attention:image` an attention's output,
    `joint.3.attention` the attention itself, and `prompt:text` the prompt as the denoiser receives it.
    """

    block: str
    index: int | None = None
    part: str | None = None
    stream: Stream | None = None

    @classmethod
    def parse(cls, address: str | Site) -> Site:
        """Reads an address; `parse(str(site)) == site`."""
        if isinstance(address, Site):
            return address
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise ValueError(f"not a site: {address!r}; write e.g. 'single.10.attention:image'")
        block, index, part, stream = match.groups()
        return cls(block, None if index is None else int(index), part, stream)  # type: ignore[arg-type]

    @property
    def kind(self) -> str:
        """The address less its index: a key of the backbone's tables."""
        return str(Site(self.block, None, self.part, self.stream))

    def __str__(self) -> str:
        path = ".".join(str(word) for word in (self.block, self.index, self.part) if word is not None)
        return path if self.stream is None else f"{path}:{self.stream}"


@dataclass(frozen=True)
class Port:
    """Where the tensor of a site crosses the boundary of a module."""

    module: str
    """Path below the block."""
    side: Literal["input", "output"]
    slot: int
    """Position among the inputs, or in the output tuple."""
    streams: tuple[Stream, ...]
    """The token streams concatenated in this tensor, in order."""


@dataclass(frozen=True)
class Attention:
    """An attention module, and the streams that its queries and its keys are made of, in order."""

    module: str
    queries: tuple[Stream, ...]
    keys: tuple[Stream, ...]


@dataclass(frozen=True)
class Layout:
    """How many tokens each stream has, and the grids (height, width) of image and reference tokens."""

    text: int
    image: int
    reference: int = 0
    grid: tuple[int, int] = (0, 0)
    reference_grid: tuple[int, int] = (0, 0)

    def span(self, stream: Stream, streams: tuple[Stream, ...]) -> slice:
        """Where a stream's tokens are in a tensor that concatenates `streams`."""
        if streams == (stream,):
            return slice(None)
        start = sum(getattr(self, other) for other in streams[: streams.index(stream)])
        return slice(start, start + getattr(self, stream))
