"""Where the words of a text are among its tokens."""

from __future__ import annotations

import itertools
from typing import Any


def extent(tokenizer: Any, text: str) -> slice:
    """The tokens of a text, less the markers around them; of an empty one, the place where they would begin."""
    if not text.strip():
        start = extent(tokenizer, "a").start
        return slice(start, start)
    bare, marked = _ids(tokenizer, text), list(tokenizer(expanded(tokenizer, text), truncation=False, verbose=False).input_ids)
    start = next((i for i in range(len(marked) - len(bare) + 1) if marked[i : i + len(bare)] == bare), 0)
    return slice(start, start + len(bare))


def word_spans(tokenizer: Any, text: str) -> list[slice]:
    """The tokens of each word, as whitespace separates words; empty for one that the tokenizer drops.

    It counts the tokens of longer and longer beginnings, so any tokenizer will do.
    """
    words = text.split()
    start = extent(tokenizer, " ".join(words)).start
    ends = [start + len(_ids(tokenizer, " ".join(words[:count]))) for count in range(len(words) + 1)]
    return [slice(before, after) for before, after in itertools.pairwise(ends)]


def expanded(tokenizer: Any, text: str) -> str:
    """A text as its encoder gets it: pipelines write out learned words that stand for several tokens (textual inversions of several vectors)."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    for word in (word for word in added if word in text and f"{word}_1" in added):
        following = itertools.takewhile(added.__contains__, (f"{word}_{place}" for place in itertools.count(1)))
        text = text.replace(word, " ".join([word, *following]))
    return text


def padded_length(tokenizer: Any) -> int:
    """How many tokens a text is padded to."""
    return len(tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(expanded(tokenizer, text), add_special_tokens=False, truncation=False, verbose=False).input_ids) if text else []
