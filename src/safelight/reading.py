"""What the text encoders of a pipeline are given, whatever the caller typed: their token ids, read back as texts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NEAR = 0.98
"""A learned token is read as the vocabulary's word whose embedding has at least this cosine with its own."""


@dataclass(frozen=True)
class Reading:
    """What one text encoder was given in one call."""

    tokenizer: Any
    table: Tensor
    """The encoder's input embeddings, [vocabulary, width]."""
    rows: list[list[int]]
    """Token ids."""


@dataclass(frozen=True)
class Read:
    """What an encoder reads in a text, beyond the text itself."""

    texts: tuple[str, ...] = ()
    """As its tokens say: pieces between markers, and all pieces together."""
    opaque: tuple[str, ...] = ()
    """Learned tokens that no word of the vocabulary comes near."""
    pieces: tuple[str, ...] = ()
    """What stands between markers that were typed into the text; none, where none were."""

    def __or__(self, other: Read) -> Read:
        """What two encoders read."""
        return Read(
            tuple(dict.fromkeys(self.texts + other.texts)), tuple(dict.fromkeys(self.opaque + other.opaque)), self.pieces or other.pieces
        )  # fmt: skip


@dataclass
class Encoders:
    """The text encoders of a pipeline, each with its tokenizer."""

    pipe: Any
    found: list[tuple[Any, nn.Module]] = field(init=False)

    def __post_init__(self) -> None:
        parts = getattr(self.pipe, "components", {})
        names = [name for name in parts if name.startswith("text_encoder") and isinstance(parts[name], nn.Module)]
        pairs = ((parts.get(name.replace("text_encoder", "tokenizer")), parts[name]) for name in names)
        self.found = [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None]

    @contextmanager
    def watched(self) -> Iterator[list[Reading]]:
        """While it lasts, all that this thread gives the encoders is put into the list, in order."""
        readings: list[Reading] = []
        with ExitStack() as stack:
            for encoder in {id(encoder): encoder for _, encoder in self.found}.values():
                tokenizer = next(own for own, other in self.found if other is encoder)
                table = encoder.get_input_embeddings()  # type: ignore[operator]
                for module in encoder.modules():
                    if isinstance(module, nn.Embedding) and module.num_embeddings == table.num_embeddings:
                        hook = _watching(readings, tokenizer, table, threading.get_ident())
                        stack.callback(module.register_forward_pre_hook(hook).remove)
            yield readings


def _watching(readings: list[Reading], tokenizer: Any, table: Any, thread: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread and arguments:
            ids = arguments[0]
            readings.append(Reading(tokenizer, table.weight, ids.reshape(-1, ids.shape[-1]).tolist()))

    return note


def read(reading: Reading, row: int, typed: Sequence[str]) -> Read:
    """What a row of an encoder's input says beyond the texts that were typed; nothing, where it is the usual tokens of one of them."""
    ids, tokenizer = reading.rows[row], reading.tokenizer
    pieces = segments(ids, _markers(tokenizer))
    learned = _learned(tokenizer)
    strange = [token for token in ids if token in learned]
    joined = [token for piece in pieces for token in piece]
    texts: list[str] = []
    if len(pieces) > 1 or not any(_is_usual(tokenizer, joined, text) for text in typed):
        texts += [_text(tokenizer, piece) for piece in (*pieces, joined)] if joined else []
    opaque: list[str] = []
    if strange:
        words = {token: _nearest(reading, token, learned) for token in dict.fromkeys(strange)}
        opaque = [_text(tokenizer, [token]) for token, word in words.items() if word is None]
        known = {token: word for token, word in words.items() if word is not None}
        texts.append(_text(tokenizer, [known.get(token, token) for token in joined]))
        for token in words:  # a placeholder may stand for several: each is judged in its place, and by itself
            for one in {token, known.get(token, token)}:
                texts += [_text(tokenizer, [one if other == token else other for other in joined if other == token or other not in words])]
                texts += [_text(tokenizer, [one])]
    between = tuple(_text(tokenizer, piece) for piece in pieces) if len(pieces) > 1 else ()
    return Read(tuple(dict.fromkeys(text for text in texts if text not in typed)), tuple(opaque), between)


def segments(ids: Sequence[int], markers: set[int]) -> list[list[int]]:
    """The runs of tokens between markers: an encoder reads on where its end marker was typed into a text."""
    runs: list[list[int]] = [[]]
    for token in ids:
        if token in markers:
            runs.append([])
        else:
            runs[-1].append(token)
    return [run for run in runs if run]


def _markers(tokenizer: Any) -> set[int]:
    """The ids of beginning, end, padding and the like; not that of unknown words, unless it is one of them."""
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return ends | (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def _learned(tokenizer: Any) -> set[int]:
    """The ids of tokens that were added to the vocabulary and are no markers, as textual inversions are."""
    return set(tokenizer.get_added_vocab().values()) - set(tokenizer.all_special_ids)


def _is_usual(tokenizer: Any, ids: Sequence[int], text: str) -> bool:
    """Whether ids are the tokens of a text, or its first ones, where it was cut off."""
    usual = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return list(ids) == list(usual[: len(ids)]) and (len(ids) > 0 or not usual)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()


@torch.no_grad()
def _nearest(reading: Reading, token: int, learned: set[int]) -> int | None:
    """The vocabulary's token that means the same as a learned one; None if there is none."""
    table = reading.table.detach().float()
    likeness = torch.nn.functional.cosine_similarity(table, table[token][None])
    likeness[[other for other in learned if other < len(table)]] = -1
    best = int(likeness.argmax())
    return best if float(likeness[best]) >= NEAR else None
