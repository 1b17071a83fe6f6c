"""A list of words, as a baseline."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration import Calibration
from ..detector import Detector, Verdict


@dataclass(kw_only=True, eq=False)
class Keywords(Detector[str]):
    """Whole words of a list, whatever their case, accents, width of letters or invisible characters.

    It knows neither synonyms nor context: "shot" is found in "a shot of espresso", and a misspelt word is missed.
    """

    words: Mapping[str, Sequence[str]] = field(metadata={"artefact": "words"})
    """Category -> words and phrases."""
    threshold: float = 0.5
    """Scores are 0 or 1."""
    calibration: Calibration | None = field(default=None, metadata={"artefact": "words"})

    def __post_init__(self) -> None:
        if any(isinstance(listed, str) for listed in self.words.values()):
            raise ValueError("each category needs a list of words, not one text")
        phrases = {category: [plain(word) for word in listed] for category, listed in self.words.items()}
        if not any(phrases.values()) or not all(phrase for listed in phrases.values() for phrase in listed):
            raise ValueError("a word list needs at least one word, and no empty ones: it could not tell anything from anything")
        self.patterns = {category: _pattern(listed) for category, listed in phrases.items() if listed}

    def __call__(self, items: Sequence[str]) -> Tensor:
        """1 where a word of the list occurs, [batch]."""
        return torch.tensor([verdict.score for verdict in self.verdicts(items)])

    def verdicts(self, items: Sequence[str]) -> list[Verdict]:
        """Verdicts with the first category that has a word in the text; the word is in the note."""
        return [self._verdict(plain(item)) for item in items]

    def _verdict(self, text: str) -> Verdict:
        for category, pattern in self.patterns.items():
            if found := pattern.search(text):
                return Verdict(1.0, self.threshold, self.threshold < 1, category, note=f"found the word {found.group()!r}")
        return Verdict(0.0, self.threshold, self.threshold < 0)


def plain(text: str) -> str:
    """A text without case, accents, invisible characters, and with single spaces."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if unicodedata.category(letter) not in ("Mn", "Cf"))
    return " ".join("".join(letters).casefold().split())


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(phrases, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
