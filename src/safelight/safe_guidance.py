"""Where a flagged sample is led instead: four providers of safe embeddings behind one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .bank import Bank, Pair
from .detector import Verdict
from .flow import Embedding
from .run import Run


class SafeGuidance(Protocol):
    """Safe embeddings for some samples of a run, one row for each of `samples`."""

    def __call__(self, run: Run, samples: Sequence[int], verdicts: Sequence[Verdict]) -> Embedding: ...


@dataclass(frozen=True)
class InContext:
    """The prompt plus words that set a safe context; by category where given."""

    words: str = "peaceful and harmless"
    by_category: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, run: Run, samples: Sequence[int], verdicts: Sequence[Verdict]) -> Embedding:
        """Encodes `{prompt}, {words}`."""
        words = (self.by_category.get(verdict.concept or "", self.words) for verdict in verdicts)
        return run.encode([f"{run.plain_prompts[i]}, {context}" for i, context in zip(samples, words, strict=True)])


@dataclass(frozen=True)
class NearestTwin:
    """The safe twin of the nearest unsafe neighbour in a bank."""

    bank: Bank

    def __call__(self, run: Run, samples: Sequence[int], verdicts: Sequence[Verdict]) -> Embedding:
        """Encodes the twins' texts."""
        embeddings = normalize(run.pool([run.plain_prompts[i] for i in samples]).float().cpu(), dim=-1)
        unsafe = self.bank.embeddings[: len(self.bank.twins)]  # [unsafe, width]
        nearest = (embeddings @ unsafe.T).argmax(dim=-1)
        return run.encode([self.bank.twins[index] for index in nearest.tolist()])


@dataclass(frozen=True)
class Rewrite:
    """The safe prompt that a language model proposed when it flagged the prompt."""

    fallback: str = ""

    def __call__(self, run: Run, samples: Sequence[int], verdicts: Sequence[Verdict]) -> Embedding:
        """Encodes each verdict's `safe_prompt`, or the fallback where there is none."""
        return run.encode([verdict.safe_prompt if verdict.safe_prompt is not None else self.fallback for verdict in verdicts])


@dataclass(frozen=True)
class Arithmetic:
    """The prompt's own embedding, shifted from unsafe to safe on the tokens that carry the concept.

    For each token, the mean shift of its nearest neighbours among the bank's tokens of unsafe prompts. The bank holds all tokens of
    those prompts, so that a token which carries nothing unsafe meets its like there and is hardly moved.
    """

    bank: Bank
    k: int = 8
    temperature: float = 0.02

    def __call__(self, run: Run, samples: Sequence[int], verdicts: Sequence[Verdict]) -> Embedding:
        """Encodes the prompts and shifts them."""
        if self.bank.tokens is None or self.bank.shifts is None:
            raise ValueError("this bank holds no token shifts; build it from pairs of equal token count (`safelight bank --shifts`)")
        own = run.encode([run.plain_prompts[i] for i in samples])
        text = own.text + self.shift(own.text)
        pooled = own.pooled
        if pooled is not None and self.bank.pooled_shifts is not None:
            names = list(self.bank.categories)
            rows = torch.tensor([names.index(v.concept) if v.concept in names else 0 for v in verdicts])
            pooled = pooled + self.bank.pooled_shifts[rows].to(pooled)
        return Embedding(text, pooled)

    def shift(self, text: Tensor) -> Tensor:
        """The shift of each token, [batch, tokens, width] -> the same."""
        keys, shifts = self.bank.tokens, self.bank.shifts
        assert keys is not None
        assert shifts is not None
        likeness = normalize(text.float(), dim=-1).cpu() @ normalize(keys, dim=-1).T  # [batch, tokens, entries]
        nearest = likeness.topk(min(self.k, len(keys)), dim=-1)
        weights = (nearest.values / self.temperature).softmax(dim=-1)
        return (weights[..., None] * shifts[nearest.indices]).sum(dim=-2).to(text)


class TokenShifts(NamedTuple):
    """What `Arithmetic` needs: token embeddings of unsafe prompts, and their shifts to the safe twins."""

    tokens: Tensor
    shifts: Tensor
    pooled: Tensor | None


def token_shifts(run: Run, pairs: Sequence[Pair], limit: int = 4096) -> TokenShifts:
    """Measures shifts on pairs whose members differ by replaced words only.

    `limit` bounds the tokens kept; they are chosen evenly over the pairs.

    Raises:
        ValueError: if no pair has a safe member.
    """
    usable = [pair for pair in pairs if pair.safe]
    if not usable:
        raise ValueError("no pair has a safe member; token shifts need both")
    unsafe, safe = run.encode([pair.unsafe for pair in usable]), run.encode([pair.safe for pair in usable])
    tokens, shifts = unsafe.text.flatten(0, 1).float(), (safe.text - unsafe.text).flatten(0, 1).float()
    unique = _distinct(torch.cat([tokens, shifts], dim=1))
    chosen = _spread(unique, shifts[unique].norm(dim=1), limit)
    pooled = None
    if unsafe.pooled is not None and safe.pooled is not None:
        categories = list(dict.fromkeys(pair.category for pair in pairs))
        owner = torch.tensor([categories.index(pair.category) for pair in usable])
        difference = (safe.pooled - unsafe.pooled).float()
        pooled = torch.stack([(difference[owner == i] if (owner == i).any() else difference).mean(dim=0) for i in range(len(categories))])
    return TokenShifts(tokens[chosen], shifts[chosen], pooled)


def _spread(rows: Tensor, moved: Tensor, limit: int) -> Tensor:
    """At most `limit` of some rows, a third of them from those that are moved most, as few words in a prompt are unsafe; else evenly."""
    if len(rows) <= limit:
        return rows
    far = moved > moved.max() / 2
    share = min(int(far.sum()), limit // 3)
    parts = [(rows[far], share), (rows[~far], limit - share)]
    return torch.cat([part[torch.linspace(0, len(part) - 1, min(count, len(part))).round().long()] for part, count in parts])


def _distinct(rows: Tensor) -> Tensor:
    """Indices of rows that differ after rounding, in order of appearance."""
    seen: dict[bytes, int] = {}
    for index, row in enumerate((rows * 64).round().to(torch.int16).numpy()):
        seen.setdefault(row.tobytes(), index)
    return torch.tensor(list(seen.values()))
