"""A list of words, as a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..calibration import Calibration
from ..detector import Detector, Verdict, exceeds
from ..words import WordList

REMEDY = "give categories with their words, e.g. words={'weapons': ['knife', 'machine gun']}"


def parse_words(text: str) -> dict[str, list[str]]:
    """A word list from its text form: `knife,machine gun`, or with categories `weapons:knife|machine gun,drugs:pill`."""
    words: dict[str, list[str]] = {}
    for part in text.split(","):
        category, colon, listed = part.partition(":")
        words.setdefault(category.strip() if colon else "words", []).extend(word.strip() for word in (listed if colon else part).split("|"))
    return words


@dataclass(kw_only=True, eq=False)
class Keywords(Detector[str]):
    """Words of a list, as text encoders read them: whatever their case, accents, forms of letters, separators or invisible characters.

    In scripts without spaces they are found anywhere, else as whole words. It knows neither synonyms nor context: "shot" is found in
    "a shot of espresso", and a misspelt word is missed.
    """

    words: Mapping[str, Sequence[str]] = field(metadata={"artefact": "words", "parse": parse_words})
    """Category -> words and phrases; read-only, since a list that changes would not be looked at again."""
    threshold: float = 0.5
    """Scores are 0 or 1."""
    calibration: Calibration | None = field(default=None, metadata={"artefact": "words"})

    def __post_init__(self) -> None:
        self.words = _checked(self.words)
        self._listed = [(category, word) for category, listed in self.words.items() for word in listed]
        self._rank = {category: rank for rank, category in enumerate(self.words)}
        self._list = WordList([word for _, word in self._listed])

    def __getstate__(self) -> dict[str, Any]:
        return {"words": dict(self.words), "threshold": self.threshold, "calibration": self.calibration}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # neither the read-only list nor its tree can be pickled

    def __call__(self, items: Sequence[str]) -> Tensor:
        """1 where a word of the list occurs, [batch]."""
        return torch.tensor([verdict.score for verdict in self.verdicts(items)])

    def verdicts(self, items: Sequence[str]) -> list[Verdict]:
        """Verdicts with the first category that has a word in the text; the word is in the note."""
        return [self._verdict(item) for item in items]

    def _verdict(self, text: str) -> Verdict:
        places = [(self._rank[self._listed[index][0]], start, -end, index) for index, start, end in self._list.find(text)]
        if not places:
            return Verdict(0.0, self.threshold, exceeds(0.0, self.threshold))
        category, word = self._listed[min(places)[-1]]
        return Verdict(1.0, self.threshold, exceeds(1.0, self.threshold), category, note=f"found the word {word!r}")


def _checked(words: Any) -> Mapping[str, Sequence[str]]:
    """A read-only copy of a word list.

    Raises:
        ValueError: naming what is no list of words.
    """
    if not isinstance(words, Mapping):
        raise ValueError(f"words={_shown(words)} has no categories; {REMEDY}")
    for category, listed in words.items():
        if isinstance(listed, (str, Mapping)) or not isinstance(listed, Iterable):
            raise ValueError(f"words[{category!r}]={_shown(listed)} is no list of words; {REMEDY}")
    copied = {category: tuple(sorted(listed, key=str) if isinstance(listed, Set) else listed) for category, listed in words.items()}
    for category, listed in copied.items():
        for word in listed:
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"words[{category!r}] holds {_shown(word)}, which is no word; remove it")
    if not any(copied.values()):
        raise ValueError(f"words={_shown(words)} has no words: it could not tell anything from anything; {REMEDY}")
    return MappingProxyType(copied)


def _shown(value: Any) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."
