"""Finds listed words in a text as text encoders read it.

Tokenizers normalise a text, and take letters, digits and signs apart: `holding_knife` and `2knife` reach a model as `knife`. So a word here
is a run of letters or of digits. What nobody sees (control characters, joiners, marks without a letter of their own) may join what stands
around it, or separate it: a word counts under either reading.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence, Set
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import regex

UNSEEN = "\0"
"""Stands for what may join or separate."""
SPELLED = 3
"""From so many letters on, letters that stand apart (k n i f e) are a word."""

VOWELLED = (
    "Thai", "Lao", "Khmer", "Myanmar", "Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam",
    "Sinhala", "Tibetan",
)  # fmt: skip
"""Scripts whose marks are vowels: without them, another word is left."""
UNSPACED = ("Han", "Hiragana", "Katakana", "Bopomofo", "Hangul", "Thai", "Lao", "Khmer", "Myanmar", "Tai_Le", "New_Tai_Lue", "Tai_Tham")
"""Scripts that write words, or a word and its particles, without spaces."""

_VOWELLED = "".join(rf"\p{{Script={script}}}" for script in VOWELLED)
_UNSPACED = "".join(rf"\p{{Script_Extensions={script}}}" for script in UNSPACED)
_HIDDEN = regex.compile(
    rf"[[\p{{C}}\p{{Default_Ignorable_Code_Point}}\p{{Me}}[\p{{M}}--[{_VOWELLED}]]\u0085\v\u2800\u0640]--[\t\n\f\r]]+", regex.V1
)
"""Control, format, unassigned and filling characters, marks that compose with no letter, the blank of Braille, and Arabic's stretch."""
_STRAY = regex.compile(
    "|".join(rf"(?<!\p{{Script={script}}}\0*)[\p{{M}}&&\p{{Script={script}}}]+" for script in VOWELLED), regex.V1
)  # fmt: skip
"""Vowels without a letter of their script."""
_ACCENT = regex.compile(rf"[\p{{Mn}}--[{_VOWELLED}\u3099\u309A]]", regex.V1)
_HUMP = regex.compile(r"(?<=\p{Ll})(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})")
_HANGUL_APART = regex.compile(r"(?<=[\u1100-\u11FF\uAC00-\uD7A3])\0+(?=[\u1161-\u11FF])")
_FREE = regex.compile(rf"[[\p{{L}}\p{{M}}\p{{N}}]&&[{_UNSPACED}]]", regex.V1)
_LETTER, _DIGIT, _MARK = regex.compile(r"[\p{L}\p{M}]"), regex.compile(r"\p{N}"), regex.compile(r"\p{M}")
_SIGNS_BEFORE, _SIGNS_BEHIND = regex.compile(r"\p{S}*"), regex.compile(r"\p{S}*$")

Node = dict[str, Any]


class Found(NamedTuple):
    """Which of the listed words was found, by its number, and where in the text as read."""

    word: int
    start: int
    end: int


class WordList:
    """Words and phrases, as a tree of their letters: the time that a text takes does not depend on their number.

    Raises:
        ValueError: for a word of which nothing is left to look for.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.root: Node = {}
        for index, word in enumerate(words):
            letters, breaks = _spelling(word)
            if not letters:
                raise ValueError(f"the word {word!r} has no letter, digit or sign to look for; remove it")
            node = self.root
            for letter in letters:
                node = node.setdefault(letter, {})
            node.setdefault("", []).append((index, breaks))

    def find(self, text: str) -> Iterator[Found]:
        """All places at which listed words are, from left to right."""
        read = as_read(text)
        for start, letter in enumerate(read):
            if letter in self.root and _apart(read, start):
                yield from self._from(read, start)

    def _from(self, read: str, start: int) -> Iterator[Found]:
        """The words that begin at a place."""
        node, depth = self.root, 0
        gaps: dict[int, bool] = {}  # how many letters stand before a gap -> whether it certainly separates
        for place in range(start, len(read)):
            letter = read[place]
            if letter in node:
                node, depth = node[letter], depth + 1
                if "" in node and _apart(read, place + 1):
                    yield from (Found(index, start, place + 1) for index, breaks in node[""] if _fits(gaps, breaks, depth))
            elif _kind(letter) == "gap":
                gaps[depth] = gaps.get(depth, False) or letter != UNSEEN
            else:
                return


def as_read(text: str) -> str:
    """A text without case, accents and forms of letters, and with `UNSEEN` where nobody sees whether something joins or separates."""
    if text.isascii():
        return _HUMP.sub(UNSEEN, _HIDDEN.sub(UNSEEN, text)).lower()
    text = _STRAY.sub(UNSEEN, _HIDDEN.sub(UNSEEN, unicodedata.normalize("NFKC", text)))
    text = _HANGUL_APART.sub("", _HUMP.sub(UNSEEN, text))
    return unicodedata.normalize("NFC", _ACCENT.sub("", unicodedata.normalize("NFKD", text)).casefold())


def _spelling(word: str) -> tuple[str, Set[int]]:
    """A listed word's letters, and where between them others may stand: at its own spaces and signs, and between letters and digits.

    Signs at its ends belong to it if they are symbols, as in `c++`, and so does an emoji.
    """
    read = as_read(word).replace(UNSEEN, "").strip()
    before, behind = _SIGNS_BEFORE.match(read).end(), _SIGNS_BEHIND.search(read).start()
    letters, breaks = "", set()
    for place, letter in enumerate(read):
        if _kind(letter) == "gap" and before <= place < behind:
            breaks.add(len(letters))
            continue
        if letters and {_kind(letters[-1]), _kind(letter)} == {"letter", "digit"}:
            breaks.add(len(letters))
        letters += letter
    return letters, breaks - {0, len(letters)}


def _fits(gaps: dict[int, bool], breaks: Set[int], depth: int) -> bool:
    """Whether letters with gaps between them are the word: gaps lie at its breaks, or between all letters of a part of it."""
    for start, end in pairwise((0, *sorted(breaks), depth)):
        inside = [gaps.get(place) for place in range(start + 1, end)]
        if any(inside) and (None in inside or depth < SPELLED):
            return False
    return True


def _apart(read: str, place: int) -> bool:
    """Whether something new may begin at a place: behind a gap, between letters and digits, anywhere in a script without spaces."""
    if place in (0, len(read)):
        return True
    before, behind = _kind(read[place - 1]), _kind(read[place])
    return (before != behind or behind not in ("letter", "digit")) and not _MARK.match(read[place])


@cache
def _kind(letter: str) -> str:
    """Free (of a script without spaces), letter, digit, or gap: all that separates."""
    return "free" if _FREE.match(letter) else "letter" if _LETTER.match(letter) else "digit" if _DIGIT.match(letter) else "gap"
