"""The words that an attack may use, and where they stand in the token sequences of all text encoders of a pipeline."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...errors import UnsupportedPipeline

SLOTS = ("", "_2", "_3")
LONGEST = 512
"""So many tokens are read at most, whatever a tokenizer claims."""


class TextEncoder(NamedTuple):
    """A text encoder with its tokenizer."""

    tokenizer: Any
    net: nn.Module
    length: int
    """How many tokens it reads."""

    @property
    def table(self) -> Tensor:
        """The embeddings of its tokens, [tokens, width]."""
        return self.net.get_input_embeddings().weight  # type: ignore[operator,no-any-return]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids as the pipeline gives them to the encoder, [texts, length]."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        return tokens.input_ids  # type: ignore[no-any-return]

    def count(self, text: str) -> int:
        """How many tokens a text has, without markers."""
        return len(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    @property
    def markers(self) -> tuple[int, int]:
        """How many markers stand before and behind a text."""
        plain, marked = (self.tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
        before = next(i for i in range(len(marked)) if list(marked[i : i + len(plain)]) == list(plain))
        return before, len(marked) - len(plain) - before


def text_encoders(pipe: Any) -> list[TextEncoder]:
    """The text encoders of a pipeline; one that serves twice is named once.

    Raises:
        UnsupportedPipeline: if it has none.
    """
    found: dict[int, TextEncoder] = {}
    for slot in SLOTS:
        tokenizer, net = getattr(pipe, f"tokenizer{slot}", None), getattr(pipe, f"text_encoder{slot}", None)
        if tokenizer is not None and net is not None:
            limit = getattr(net.config, "max_position_embeddings", None) or min(tokenizer.model_max_length, LONGEST)
            found.setdefault(id(net), TextEncoder(tokenizer, net, limit))
    if not found:
        raise UnsupportedPipeline("this pipeline was loaded without text encoders, and an attack on its prompts needs them")
    return list(found.values())


@dataclass(frozen=True)
class Words:
    """Words that are one token for every text encoder, so that any of them can take another's place."""

    encoders: tuple[TextEncoder, ...]
    texts: tuple[str, ...]
    ids: Tensor
    """[encoders, words]"""

    @classmethod
    def of(cls, pipe: Any, banned: Collection[str] = ()) -> Words:
        """The words of a pipeline's text encoders, without some.

        Raises:
            ValueError: if nothing is left.
        """
        known = _known(pipe)
        refused = {word.casefold() for word in banned}
        kept = [index for index, text in enumerate(known.texts) if text not in refused]
        if len(kept) < 2:
            raise ValueError(f"of {len(known.texts)} words that are one token each, {len(kept)} are left; ban fewer words")
        return replace(known, texts=tuple(known.texts[index] for index in kept), ids=known.ids[:, kept])

    def gradients(self, deltas: Sequence[Tensor]) -> Tensor:
        """By how much each word would change the loss in each slot, to first order, up to a constant per slot.

        Args:
            deltas: for each encoder the loss's gradient with respect to the embeddings in the slots, [batch, slots, width].

        Returns:
            [batch, slots, words]
        """
        parts = [delta @ encoder.table[own].T for delta, encoder, own in zip(deltas, self.encoders, self.ids, strict=True)]
        return torch.stack(parts).sum(dim=0)

    @property
    def room(self) -> int:
        """How many words every encoder reads."""
        return min(encoder.length - sum(encoder.markers) for encoder in self.encoders)


@dataclass(frozen=True)
class Template:
    """A prompt with gaps: texts, and None where a word goes."""

    parts: tuple[str | None, ...]

    @property
    def slots(self) -> int:
        """How many gaps there are."""
        return sum(part is None for part in self.parts)

    def fill(self, words: Sequence[str]) -> str:
        """The prompt with words in its gaps."""
        rest = iter(words)
        return " ".join(next(rest) if part is None else part for part in self.parts)

    def places(self, encoder: TextEncoder) -> list[int]:
        """Where the gaps are in an encoder's token sequence; those beyond its end are where they would be."""
        place, found = encoder.markers[0], []
        for part in self.parts:
            if part is None:
                found.append(place)
            place += 1 if part is None else encoder.count(part)
        return found


_KNOWN: WeakKeyDictionary[Any, Words] = WeakKeyDictionary()


def _known(pipe: Any) -> Words:
    """All words, found once for each pipeline: real vocabularies have tens of thousands."""
    if pipe not in _KNOWN:
        encoders = text_encoders(pipe)
        texts = list(dict.fromkeys(_plain(encoders[0].tokenizer)))
        own = [encoder.tokenizer(texts, add_special_tokens=False).input_ids for encoder in encoders]
        kept = [index for index in range(len(texts)) if all(len(ids[index]) == 1 for ids in own)]
        ids = torch.tensor([[ids[index][0] for index in kept] for ids in own])
        known = torch.ones(len(kept), dtype=torch.bool)
        for encoder, row in zip(encoders, ids, strict=True):
            known &= row != (-1 if encoder.tokenizer.unk_token_id is None else encoder.tokenizer.unk_token_id)
        _KNOWN[pipe] = Words(tuple(encoders), tuple(texts[kept[i]] for i in known.nonzero()[:, 0].tolist()), ids[:, known])
    return _KNOWN[pipe]


def _plain(tokenizer: Any) -> Iterator[str]:
    """The tokens of a vocabulary that read as whole words when they are written out, in the order of their ids."""
    special = set(tokenizer.all_special_ids)
    for index in sorted(tokenizer.get_vocab().values()):
        text = tokenizer.decode([index]).strip()
        if index not in special and text.isascii() and text.isalpha() and text == text.casefold():
            yield text
