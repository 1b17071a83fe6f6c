"""Files that are whole or not there, and folders that one run has for itself."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from ...errors import ArtefactError
from ...tables import lines_of

LOCK = ".lock"


def write_atomically(path: Path, contents: bytes) -> None:
    """Writes a file so that no reader, and no crash, ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_lines(file: Path, remedy: str) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last line that an interruption cut short counts as not written.

    Raises:
        ArtefactError: for any other damaged line, with its number and the remedy.
    """
    lines = lines_of(file)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ArtefactError(f"{file}, line {number} is damaged ({error}); {remedy}") from error
        found.append(value)
    return found


@contextmanager
def only_one(folder: Path, shard: tuple[int, int] | None = None) -> Iterator[None]:
    """Keeps a folder (or one shard of it) to this process. A lock dies with its process, so a crash leaves none behind.

    Raises:
        ArtefactError: if another run is at work there; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / _lock_name(shard)
    with own.open("a+") as file:
        if not _try_lock(file):
            raise _busy(folder, own)
        others = [other for other in folder.glob(f"{LOCK}*") if other != own and not _goes_with(other.name, shard)]
        if busy := next((other for other in others if _is_held(other)), None):
            raise _busy(folder, busy)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield


def _lock_name(shard: tuple[int, int] | None) -> str:
    return LOCK if shard is None else f"{LOCK}-{shard[0]}-of-{shard[1]}"


def _goes_with(name: str, shard: tuple[int, int] | None) -> bool:
    """Other shards of the same division may work at the same time."""
    return shard is not None and name.endswith(f"-of-{shard[1]}")


def _try_lock(file: TextIO) -> bool:
    import fcntl  # not on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_held(path: Path) -> bool:
    with path.open("a+") as file:
        return not _try_lock(file)


def _busy(folder: Path, lock: Path) -> ArtefactError:
    try:
        holder = json.loads(lock.read_text())
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return ArtefactError(f"{folder} is in use by {who}; wait until it is done, stop it, or choose another folder")
