"""Files of artefacts: read with limits that are checked before anything is allocated, written whole or not at all.

An artefact may come from a stranger. So it is opened without waiting (a pipe would wait for ever), must be a regular file, and its JSON and the header of
its tensors are checked in full before a tensor is made. A hash of the content is written along, and checked where there is one: it tells damage,
and is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ArtefactError

LARGEST_JSON = 32 << 20
"""Bytes of a JSON file, or of the header of tensors."""
LARGEST_FILE = 8 << 30
DEEPEST = 64
"""Levels of nested lists and objects."""
MOST_TENSORS = 100_000
MOST_AXES = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
HASH = "sha256"


@dataclass(frozen=True)
class Facts:
    """The JSON facts of an artefact, looked at by type."""

    known: Mapping[str, Any]
    where: str
    """For messages: the file."""
    remedy: str
    damaged: bool = False
    """Whether the content is another one than was written; told last, as what exactly is wrong says more."""

    def settle(self) -> None:
        """Raises ArtefactError if the content is another one than was written."""
        if self.damaged:
            raise self.error(f"is damaged: its content is not what was written (its {HASH} differs)")

    def error(self, message: str) -> ArtefactError:
        """An error that names the file and the remedy."""
        return ArtefactError(f"{self.where} {message}; {self.remedy}")

    def get(self, name: str) -> Any:
        """A fact of any type, also null."""
        if name not in self.known:
            raise self.error(f"lacks a part: {name!r}")
        return self.known[name]

    def text(self, name: str) -> str:
        """A text that isn't empty."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"has {name}={_short(value)}, which is no text")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number."""
        return self._number(name, self.get(name), low, high)

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(f"has {name}={_short(value)}, which is no whole number from {low} to {high}")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """Finite numbers, at least one."""
        return tuple(self._number(name, value, -math.inf, math.inf) for value in self._listed(name))

    def texts(self, name: str, *, some: bool = True) -> tuple[str, ...]:
        """Texts, at least one if `some`."""
        values = self._listed(name, some=some)
        if not all(isinstance(value, str) and (value.strip() or not some) for value in values):
            raise self.error(f"has {name}={_short(values)}, which are no texts")
        return tuple(values)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.error(f"has {name}={_short(value)}, which is no object")
        return value

    def sizes(self, name: str, most: int = 1 << 20) -> dict[str, Any]:
        """The settings of a network: whole numbers of at most `most`, lists of them, switches, numbers, texts."""
        found = self.mapping(name)
        for key, value in found.items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, (list, dict)) or (isinstance(one, (int, float)) and not -most <= one <= most):
                    raise self.error(f"has {name}.{key}={_short(value)}, which no network of this kind has")
        return found

    def parsed(self, name: str) -> Facts:
        """The facts that a text holds as JSON."""
        try:
            value = parse_json(self.text(name))
        except ValueError as error:
            raise self.error(f"has damaged {name}: {error}") if not isinstance(error, ArtefactError) else error from None
        if not isinstance(value, dict):
            raise self.error(f"has {name} that are no object")
        return Facts(value, self.where, self.remedy)

    def only(self, names: Sequence[str]) -> None:
        """Refuses facts of other names."""
        if strange := sorted(set(self.known) - set(names)):
            raise self.error(f"has one part too many: {strange[0]!r}")

    def _listed(self, name: str, *, some: bool = True) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or (some and not value):
            raise self.error(f"has {name}={_short(value)}, which is no list{' with something in it' if some else ''}")
        return value

    def _number(self, name: str, value: Any, low: float, high: float) -> float:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
        if not fine or not low <= value <= high:
            bounds = f" from {low:g} to {high:g}" if math.isfinite(low) or math.isfinite(high) else ""
            raise self.error(f"has {name}={_short(value)}, which is no number{bounds}")
        return float(value)


def inside(folder: Path, name: Any, where: str) -> Path:
    """The path of a file of a folder, given by its plain name.

    Raises:
        ArtefactError: if the name leads elsewhere, also by a symbolic link.
    """
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise ArtefactError(f"{where} points outside the bundle: {_short(name)}")
    path = folder / name
    leads = os.path.realpath(path)
    if path.is_symlink() and Path(leads).parent != Path(os.path.realpath(folder)):
        raise ArtefactError(f"{where} points outside the bundle: {name!r} is a link to {leads}")
    return path


def read_bytes(path: str | Path, most: int = LARGEST_JSON) -> bytes:
    """The content of a regular file.

    Raises:
        ArtefactError: if it is missing, something else than a file, or larger than `most`.
    """
    with _opened(path, most) as file:
        return file.read(most + 1)


def _opened(path: str | Path, most: int) -> BinaryIO:
    """A regular file of at most `most` bytes, opened without waiting for who might write into it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} can't be read ({error})") from error
    try:
        _check_size(path, os.fstat(descriptor), most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_size(path: str | Path, found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ArtefactError(f"{path} is no file, but a folder, a pipe or a device")
    if found.st_size > most:
        raise ArtefactError(f"{path} has {found.st_size:,} bytes, more than the {most:,} that such a file may have")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        ArtefactError: if it can't be read, or is no strict JSON.
    """
    try:
        return parse_json(read_bytes(path))
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged: {error}" if not isinstance(error, ArtefactError) else str(error)) from error


def parse_json(text: bytes | str) -> Any:
    """Strict JSON: UTF-8, no name twice in an object, no NaN or Infinity, at most `DEEPEST` levels, no half characters.

    Raises:
        ValueError: saying what is wrong.
    """
    try:
        read = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(read, object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    _check_nesting(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {_short(next(name for name in names if names.count(name) > 1))} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        for one in level:
            for text in (one,) if isinstance(one, str) else one if isinstance(one, dict) else ():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError("it has half a character (a lone surrogate)") from None
        level = [part for one in level if isinstance(one, (dict, list)) for part in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    partial = _partial(path)
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _settle(partial, Path(path))


def read_tensors(path: str | Path, what: str, format: str, remedy: str) -> tuple[Facts, dict[str, Tensor]]:
    """The metadata (texts) and tensors of a safetensors file of some format.

    Args:
        path: the file.
        what: it should be, for messages: "a bank".
        format: the value of the metadata's `format`.
        remedy: what to do if it is not.

    Raises:
        ArtefactError: if it is missing, damaged, or something else.
    """
    try:
        metadata = _checked_header(path)
    except ArtefactError as error:
        raise ArtefactError(f"{path} can't be read as {what} ({error}); {remedy}") from error
    if metadata.get("format") not in (format, f"{format}+{HASH}"):
        kind = what.split(" ", 1)[-1] if what.startswith(("a ", "an ")) else what
        told = _short(metadata.get("format", "something else"))
        raise ArtefactError(f"{path} holds no {kind} of this version ({format}) but {told}; {remedy}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtefactError(f"{path} can't be read as {what} ({error}); {remedy}") from error
    hashed = metadata["format"] != format or HASH in metadata  # files of before there were hashes have none
    return Facts(metadata, str(path), remedy, hashed and metadata.get(HASH) != _hash_of(metadata, tensors)), tensors


def _checked_header(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, once its header is found sound."""
    with _opened(path, LARGEST_FILE) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(LARGEST_JSON, size - 8):
            raise ArtefactError("it has no header of tensors")
        text = file.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ArtefactError(f"its header is damaged: {error}") from error
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise ArtefactError("its header lists no tensors, or too many")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtefactError("its metadata are no texts")
    _check_ranges(header, size - 8 - length)
    return metadata


def _check_ranges(header: Mapping[str, Any], available: int) -> None:
    """Raises unless the tensors' bytes follow one another, from the first to the last byte that there is."""
    end = 0
    dtype: Any
    shape: Any
    offsets: Any
    for name, entry in sorted(header.items(), key=lambda item: _start(item[1])):
        dtype, shape, offsets = (entry.get(key) if isinstance(entry, dict) else None for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ArtefactError(f"its tensor {_short(name)} is of the type {_short(dtype)}; known are {', '.join(ITEM_BYTES)}")
        if not _are_sizes(shape) or len(shape) > MOST_AXES or not _are_sizes(offsets) or len(offsets) != 2:
            raise ArtefactError(f"its tensor {_short(name)} has the shape {_short(shape)} at {_short(offsets)}")
        if offsets[0] != end or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype] or offsets[1] > available:
            raise ArtefactError(f"the bytes of its tensor {_short(name)} are not where, or as many as, its shape says")
        end = offsets[1]
    if end != available:
        raise ArtefactError(f"{available - end} of its bytes belong to no tensor")


def _start(entry: Any) -> tuple[int, int]:
    offsets: Any = entry.get("data_offsets") if isinstance(entry, dict) else None
    return (offsets[0], offsets[1]) if _are_sizes(offsets) and len(offsets) == 2 else (-1, -1)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 48 for one in value)


def write_tensors(path: str | Path, format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with a hash of its content, whole or not at all.

    Raises:
        OSError: if it can't be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = {"format": f"{format}+{HASH}", **metadata}
    partial = _partial(path)
    try:
        save_file(stored, partial, {**told, HASH: _hash_of(told, stored)})
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from error
    _settle(partial, Path(path))


def content_hash(value: Any) -> str:
    """The hash of a JSON value, however it is written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hash_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    made = hashlib.sha256(json.dumps({name: text for name, text in metadata.items() if name != HASH}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def _partial(path: str | Path) -> Path:
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")


def _settle(partial: Path, path: Path) -> None:
    """Puts a file in its place once its bytes are on the disk."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(path)


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:77]}..."


__all__ = ["Facts", "content_hash", "inside", "parse_json", "read_bytes", "read_json", "read_tensors", "write_json", "write_tensors"]
