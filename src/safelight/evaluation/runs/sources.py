"""Source images of editing, stored by the hash of their pixels."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import ArtefactError
from .durable import write_atomically
from .fingerprint import digest_array

Pixels = NDArray[np.uint8]
HASH = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Sources(Mapping[str, Pixels]):
    """The images in a folder, [height, width, 3] each."""

    folder: Path

    def add(self, images: Mapping[str, Pixels]) -> None:
        """Stores images that are not there yet."""
        for name, image in images.items():
            if not self.file(name).is_file():
                write_atomically(self.file(name), as_png(image))

    def copy(self, names: Iterable[str], other: Sources) -> None:
        """Brings images over from another folder."""
        if other.folder.resolve() != self.folder.resolve():
            self.add({name: other[name] for name in names if not self.file(name).is_file()})

    def file(self, name: str) -> Path:
        """Where an image lies."""
        if not HASH.fullmatch(name):
            raise ArtefactError(f"{name!r} is no hash of a source image; the manifest is damaged, plan it again")
        return self.folder / f"{name}.png"

    def __getitem__(self, name: str) -> Pixels:
        """An image by its hash.

        Raises:
            ArtefactError: if it is missing, damaged, or another image.
        """
        file = self.file(name)
        try:
            image = from_png(file.read_bytes())
        except OSError as error:
            raise ArtefactError(f"the source image {file} can't be read ({error}); plan again to write it anew") from error
        if digest_array(image) != name:
            raise ArtefactError(f"{file} is not the image that was planned: its hash is another one; plan again to write it anew")
        return image

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in sorted(self.folder.glob("*.png")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def as_png(image: Pixels) -> bytes:
    """An image as a PNG file's contents."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def from_png(contents: bytes) -> Pixels:
    """The image in a PNG file, [height, width, 3].

    Raises:
        OSError: if it is damaged.
    """
    try:
        with Image.open(io.BytesIO(contents)) as image:
            return np.asarray(image.convert("RGB"))
    except (SyntaxError, ValueError) as error:  # what Pillow raises for some damages
        raise OSError(str(error)) from error
