"""What a thing is, as JSON, and its hash: two things with one hash do the same."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PACKAGES = ("safelight", "torch", "diffusers", "transformers", "numpy")
DIGITS = 24
"""Hexadecimal digits of a hash that are kept."""


def canonical(value: Any) -> str:
    """JSON in one form only: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """The hash of a JSON-serialisable value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:DIGITS]


def digest_array(array: Any) -> str:
    """The hash of an array's shape, type and contents."""
    array = np.ascontiguousarray(array)
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()[:DIGITS]


def digest_file(path: Path) -> str:
    """The hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def described(value: Any) -> Any:
    """A value as JSON: hyper-parameters by name, weights by their hash. Fields that belong to one machine only (keys, say) are left out."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return {"sha256": _tensor(value) if isinstance(value, torch.Tensor) else digest_array(value)}
    if isinstance(value, nn.Module):
        weights = {name: _tensor(tensor) for name, tensor in value.state_dict().items()}
        return {"kind": _kind(value), "sha256": digest(weights)}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((described(item) for item in value), key=canonical)
    if isinstance(value, Sequence):
        return [described(item) for item in value]
    return {"kind": _kind(value)} | _parts(value)


def _parts(value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: described(getattr(value, f.name)) for f in fields(value) if f.init and "local" not in f.metadata}
    plain = {name: item for name, item in getattr(value, "__dict__", {}).items() if isinstance(item, (bool, int, float, str))}
    return {} if isinstance(value, type) else plain


def _kind(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _tensor(tensor: torch.Tensor) -> str:
    array = tensor.detach().cpu().contiguous()
    if array.dtype == torch.bfloat16:  # numpy has none
        array = array.view(torch.int16)
    return digest_array(array.numpy())


def versions() -> dict[str, str]:
    """What figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found | {"python": platform.python_version(), "machine": platform.machine()}
