"""Weights that Safelight doesn't carry: found, named by their hash, and asked for in words where they are missing."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from .. import schema
from ..errors import ArtefactError
from .judge import Judge, Judgement, Picture
from .pictures import judge_distinct

HASHED = 12
"""Hexadecimal digits of a hash that reports show."""


@dataclass(frozen=True)
class Hub:
    """A model of the Hugging Face hub, or a folder in the same layout."""

    model: str
    revision: str = "main"
    download: bool = True
    """Whether what is not in the cache may be fetched."""

    def load(self, loader: Any, who: str, access: str, **settings: Any) -> Any:
        """What `loader.from_pretrained` makes of it.

        Raises:
            ArtefactError: if files, access or a package are missing; the message says whose, which, and how to get them.
        """
        try:
            return loader.from_pretrained(self.model, revision=self.revision, local_files_only=not self.download, **settings)
        except (OSError, ValueError, ImportError) as error:
            raise ArtefactError(self._complaint(who, access, error)) from error

    def identity(self) -> str:
        """The folder's hash, or the hub's commit; "unknown" while nothing has been fetched."""
        if Path(self.model).is_dir():
            files = sorted(path for path in Path(self.model).iterdir() if path.suffix in (".json", ".safetensors"))
            return f"sha256:{hash_of(*files)}"
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.model, "config.json", revision=self.revision)
        return f"commit:{Path(found).parent.name[:HASHED]}" if isinstance(found, str) else "unknown"

    def _complaint(self, who: str, access: str, error: Exception) -> str:
        from huggingface_hub import constants

        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        offline = " HF_HUB_OFFLINE is set, so nothing is fetched." if constants.HF_HUB_OFFLINE else ""
        kept = "" if self.download else " `download` is off, so only a local folder or the hub's cache is looked at."
        return f"{who} can't load {self.model}: {reason}. {access} Or give a local folder as `model`.{offline}{kept}"


@dataclass(kw_only=True, eq=False)
class HubNetwork:
    """A network that is loaded through transformers, once per instance, when it is first needed.

    It computes in 32 bits on a CPU, and in bfloat16 (or half precision, where a GPU has no bfloat16) on a GPU.
    """

    access: ClassVar[str]
    """How to get the weights."""

    model: str
    """The hub's name of the model, or a local folder."""
    revision: str = "main"
    """A branch, tag or commit of the hub's repository."""
    download: bool = True
    """Whether weights that are not in the hub's cache may be fetched."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1 …"""
    batch: Annotated[int, Ge(1)] = 8
    """How many pictures are looked at together."""

    def __post_init__(self) -> None:
        schema.check(self)

    @property
    def who(self) -> str:
        """What the network is for, in messages."""
        raise NotImplementedError

    @property
    def hub(self) -> Hub:
        """Where the weights are."""
        return Hub(self.model, self.revision, self.download)

    @property
    def place(self) -> tuple[str, Any]:
        """Device and number format."""
        return place_of(self.device)

    @property
    def identity(self) -> str:
        """Model, hash or commit, and the library that reads it; of a folder, its last name."""
        name = Path(self.model).name if Path(self.model).is_dir() else self.model
        return f"{name} {self.hub.identity()}; {version_of('transformers')}"

    @cached_property
    def network(self) -> Any:
        """The loaded network."""
        device, dtype = self.place
        made = self.hub.load(self.architecture(), self.who, self.access, dtype=dtype, use_safetensors=True)
        return made.to(device).eval().requires_grad_(False)

    @cached_property
    def processor(self) -> Any:
        """What turns pictures into the network's inputs."""
        return self.hub.load(self.preparation(), self.who, self.access)

    def inputs(self, prepared: Any) -> dict[str, Any]:
        """Prepared inputs at the network's place; numbers in its format."""
        device, dtype = self.place
        return {name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device) for name, tensor in prepared.items()}

    def architecture(self) -> Any:
        """The transformers class of the network."""
        raise NotImplementedError

    def preparation(self) -> Any:
        """The transformers class of the processor."""
        from transformers import AutoProcessor

        return AutoProcessor


@dataclass(kw_only=True, eq=False)
class HubJudge(HubNetwork, Judge):
    """A judge that is such a network."""

    version: ClassVar[str] = "1"

    def __call__(self, pictures: Sequence[Picture]) -> list[Judgement]:
        """One judgement per picture; equal pictures are judged once.

        Raises:
            ArtefactError: if weights or access are missing.
            ValueError: if one is not a picture.
        """
        return judge_distinct(pictures, self.look, self.batch)

    @property
    def who(self) -> str:
        """The judge, in messages."""
        return f"the judge {self.name!r}"

    def describe(self) -> dict[str, Any]:
        """What a report prints, with the weights' hash or commit, and the precision."""
        precision = " ".join(map(str, self.place)).replace("torch.", "")
        return super().describe() | {"version": f"{self.version}; {self.identity}", "precision": precision}

    def look(self, pictures: list[Picture]) -> list[Judgement]:
        """One judgement per picture of a batch."""
        raise NotImplementedError


def place_of(device: str) -> tuple[str, Any]:
    """Device and number format.

    Raises:
        ValueError: if that device is not there.
    """
    import torch

    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cpu":
        return name, torch.float32
    if not name.startswith("cuda") or not torch.cuda.is_available():
        raise ValueError(f"device={device!r} is not there; this machine has {'cuda and ' if torch.cuda.is_available() else ''}cpu")
    return name, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def hash_of(*files: Path) -> str:
    """The first digits of the SHA-256 of files, one after the other."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()[:HASHED]


def version_of(package: str) -> str:
    """Name and version of an installed package, or that it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def file_of(package: str, *path: str) -> Path | None:
    """A file that an installed package carries, without importing the package."""
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations if found else None) or ():
        if (file := Path(folder, *path)).is_file():
            return file
    return None
