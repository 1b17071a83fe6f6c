"""Recorded tensors on disk: one safetensors file per item, written atomically, so that a recording can be interrupted and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ArtefactError


class Shards:
    """A folder of recordings of one kind."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Opens a folder, or makes one.

        Raises:
            ArtefactError: if it holds recordings of something else.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        manifest, wanted = folder / "manifest.json", json.dumps(identity, indent=2, sort_keys=True)
        if manifest.is_file() and manifest.read_text() != wanted:
            raise ArtefactError(f"{folder} holds recordings made with other settings (see {manifest}); choose another folder, or remove it")
        if not manifest.is_file():
            partial = folder / f"manifest.{os.getpid()}.partial"
            partial.write_text(wanted)
            partial.replace(manifest)

    @classmethod
    def existing(cls, folder: Path) -> Shards:
        """Opens what is there, whatever it is.

        Raises:
            ArtefactError: if there is nothing.
        """
        try:
            return cls(folder, json.loads((folder / "manifest.json").read_text()))
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{folder} holds no recordings ({error})") from error

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores an item."""
        partial = self.folder / f"{name}.{os.getpid()}.partial"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        partial.replace(self._file(name))

    def read(self, name: str) -> dict[str, Tensor]:
        """An item.

        Raises:
            ArtefactError: if it is missing or damaged; the message names the file, and removing it is enough to have it made again.
        """
        with self._readable(name) as file:
            return load_file(file)

    def part(self, name: str, key: str, index: int | None = None) -> Tensor:
        """One of an item's tensors, or one index of its first dimension, without the rest being read.

        Raises:
            ArtefactError: as `read`.
        """
        with self._readable(name) as file, safe_open(file, "pt") as opened:
            return opened.get_tensor(key) if index is None else opened.get_slice(key)[index]  # type: ignore[no-any-return]

    def names(self) -> Iterator[str]:
        """The names of all items, sorted."""
        return (file.stem for file in sorted(self.folder.glob("*.safetensors")))

    @contextmanager
    def _readable(self, name: str) -> Iterator[Path]:
        """An item's file, with errors that say what to do."""
        try:
            yield self._file(name)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(
                f"{self._file(name)} can't be read ({error}); remove that file and run the same command again: the others are kept"
            ) from error

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
