"""A bank of known safe and unsafe prompts, as embeddings: what nearest-neighbour detection and safe guidance look things up in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .calibration import Calibration
from .errors import ArtefactError
from .files import Facts, parse_json, read_tensors, write_tensors
from .metric import discriminant, squared_distances

FORMAT = "safelight-bank/2"
PROBES = ("a photograph of a house by the sea", "two people talking in a garden", "abstract shapes in blue and yellow")
"""Prompts whose embeddings identify an encoder."""
REMEDY = "make a new one with `safelight bank`"

Encoder = Callable[[Sequence[str]], Tensor]
Metric = Literal["cosine", "discriminant"]


class Pair(NamedTuple):
    """An unsafe prompt and its safe twin."""

    unsafe: str
    safe: str
    category: str


@dataclass(frozen=True)
class Bank:
    """Embeddings with labels, and (optionally) the token-wise shifts from unsafe to safe.

    Texts of unsafe prompts are not kept; those of safe twins are, since they serve as safe guidance.
    """

    embeddings: Tensor
    """[entries, width], L2-normalised; unsafe entries come first. With a projection, those alone."""
    labels: Tensor
    """[entries]: 0 safe, else 1 + index of the category."""
    categories: tuple[str, ...]
    probes: Tensor
    """[probes, width]: the encoder's embeddings of `PROBES`."""
    twins: tuple[str, ...] = ()
    """For each unsafe entry, in order, its safe twin."""
    tokens: Tensor | None = None
    """[tokens, width]: token embeddings of unsafe prompts."""
    shifts: Tensor | None = None
    """[tokens, width]: what turns each of them into its safe twin."""
    pooled_shifts: Tensor | None = None
    """[categories, width]: mean shift of the pooled embedding."""
    calibration: Calibration | None = None
    projection: Tensor | None = None
    """[width, dims]: distances are taken after this projection; None: between the embeddings themselves."""
    projected: Tensor | None = None
    """[entries, dims]: all entries after the projection, which are far smaller than their embeddings."""

    @classmethod
    def build(
        cls, encode: Encoder, pairs: Sequence[Pair], safe: Iterable[str] = (), *, metric: Metric = "cosine", shrinkage: float | None = None
    ) -> Bank:
        """Embeds pairs and further safe prompts.

        Args:
            encode: the text encoder.
            pairs: unsafe prompts with their safe twins; a twin may be empty.
            safe: further safe prompts.
            metric: "cosine", or "discriminant" for distances that follow what separates safe prompts and categories.
            shrinkage: see `safelight.metric.discriminant`.

        Raises:
            ValueError: if there are no pairs, an embedding is not finite, or the metric is unknown or can't be learned from these prompts.
        """
        if metric not in get_args(Metric):
            raise ValueError(f"there is no metric {metric!r}; there are {' and '.join(get_args(Metric))}")
        if not pairs:
            raise ValueError("a bank needs at least one pair of an unsafe prompt and its safe twin")
        categories = tuple(dict.fromkeys(pair.category for pair in pairs))
        benign = list(dict.fromkeys([*(pair.safe for pair in pairs if pair.safe), *safe]))
        embeddings = embed_all(encode, [pair.unsafe for pair in pairs] + benign)
        labels = torch.tensor([1 + categories.index(pair.category) for pair in pairs] + [0] * len(benign))
        projection = discriminant(embeddings, labels, shrinkage) if metric == "discriminant" else None
        twins, projected = tuple(pair.safe for pair in pairs), None
        if projection is not None:
            embeddings, projected = embeddings[: len(pairs)], embeddings @ projection
        return cls(embeddings, labels, categories, embed_all(encode, PROBES), twins, projection=projection, projected=projected)

    def distances(self, embeddings: Tensor) -> Tensor:
        """Squared distances [batch, entries] of L2-normalised embeddings [batch, width]; with cosine, twice 1 - likeness."""
        if self.projection is None or self.projected is None:
            return squared_distances(embeddings, self.embeddings)
        return squared_distances(embeddings @ self.projection, self.projected)

    def with_shifts(self, tokens: Tensor, shifts: Tensor, pooled: Tensor | None) -> Bank:
        """This bank with token-wise shifts."""
        return replace(self, tokens=tokens, shifts=shifts, pooled_shifts=pooled)

    def check(self, encode: Encoder) -> None:
        """Makes sure that an encoder is the one the bank was made with.

        Raises:
            ArtefactError: if it is not.
        """
        self.check_probes(embed_all(encode, PROBES))

    def check_probes(self, own: Tensor) -> None:
        """The same, given the encoder's embeddings of `PROBES`, [probes, width]."""
        if own.shape[1] != self.embeddings.shape[1]:
            raise ArtefactError(
                f"this bank holds embeddings of width {self.embeddings.shape[1]}, the encoder gives {own.shape[1]}; build a bank with this "
                "encoder (`safelight bank`)"
            )
        likeness = float((own * self.probes.to(own)).sum(-1).min())
        if likeness < 0.99:
            raise ArtefactError(
                f"this bank was made with another encoder (its probe prompts agree to {likeness:.2f} only); build one with this encoder "
                "(`safelight bank`)"
            )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically."""
        tensors = {"embeddings": self.embeddings.half(), "labels": self.labels.short(), "probes": self.probes.half()}
        optional = {"tokens": self.tokens, "shifts": self.shifts, "pooled_shifts": self.pooled_shifts}
        tensors |= {name: tensor.half() for name, tensor in optional.items() if tensor is not None}
        if self.projection is not None and self.projected is not None:  # whitening spans more orders of magnitude than half precision has
            tensors |= {"projection": self.projection, "projected": self.projected}
        metadata = {
            "format": FORMAT,
            "categories": json.dumps(self.categories),
            "twins": json.dumps(self.twins),
            "calibration": json.dumps(asdict(self.calibration) if self.calibration else None),
        }
        write_tensors(path, FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Bank:
        """Reads a bank.

        Raises:
            ArtefactError: if the file is missing, damaged, or no bank.
        """
        metadata, tensors = read_tensors(path, "a bank", FORMAT, REMEDY)
        try:
            known = {name: parse_json(metadata.text(name)) for name in ("calibration", "categories", "twins")}
            facts = Facts(known, metadata.where, REMEDY)
            bank = cls(
                **{name: tensor.long() if name == "labels" else tensor.float() for name, tensor in tensors.items()},
                categories=facts.texts("categories"), twins=facts.texts("twins", some=False), calibration=Calibration.read(facts),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(f"{path} lacks a part of a bank, or has one too many ({error}); {REMEDY}") from error
        if flaw := bank._flaw():
            raise ArtefactError(f"{path} {flaw}; {REMEDY}")
        metadata.settle()
        return bank

    def _flaw(self) -> str | None:
        """What is wrong with the tensors, if anything."""
        floats = (self.embeddings, self.probes, self.tokens, self.shifts, self.pooled_shifts, self.projection, self.projected)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in floats if tensor is not None):
            return "contains NaN or infinite embeddings"
        entries = self.embeddings if self.projected is None else self.projected
        if len(self.categories) != len(set(self.categories)):
            return "names a category twice"
        if self.tokens is not None and (
            self.shifts is None or self.tokens.ndim != 2 or self.tokens.shape != self.shifts.shape or not len(self.tokens)
        ):
            return "has no shift for each token"
        if self.pooled_shifts is not None and (self.pooled_shifts.ndim != 2 or len(self.pooled_shifts) != len(self.categories)):
            return "has no pooled shift for each category"
        if self.probes.ndim != 2 or not len(self.probes):
            return "has no probes"
        if self.embeddings.ndim != 2 or entries.ndim != 2 or self.labels.shape != entries.shape[:1] or len(self.labels) == 0:
            return "has no label for each embedding"
        if int(self.labels.min()) < 0 or int(self.labels.max()) > len(self.categories):
            return "has labels that name no category"
        width = self.embeddings.shape[1]
        expected = None if self.projected is None else (width, self.projected.shape[1])
        if self.probes.shape[1:] != (width,) or (None if self.projection is None else tuple(self.projection.shape)) != expected:
            return "mixes embeddings of different widths"
        if len(self.twins) != int((self.labels > 0).sum()) or len(self.embeddings) < len(self.twins):
            return "does not have one safe twin for each unsafe prompt"
        return None


def embed_all(encode: Encoder, prompts: Sequence[str], batch: int = 64, *, graph: bool = False) -> Tensor:
    """L2-normalised embeddings, [prompts, width]; with their gradient, where one is being recorded, if `graph`.

    Raises:
        ValueError: if one is not finite.
    """
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        parts = [encode(prompts[i : i + batch]).float().cpu() for i in range(0, len(prompts), batch)]
    embeddings = normalize(torch.cat(parts), dim=-1)
    finite = torch.isfinite(embeddings).all(dim=-1)
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {len(prompts)} embeddings are not finite; is the text encoder in the right precision?")
    return embeddings
