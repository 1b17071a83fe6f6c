"""Paraphrase: the same thing in other words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from ...generator import Generator
from ...method import Method
from ..attack import Attack, Attempt, Progress, Success
from ..case import Case
from ..trials import Trials

Rewrites = Callable[[str], Sequence[str]]
"""Prompt -> the same in other words, the most promising first: a table, a thesaurus, a language model."""


@dataclass(kw_only=True, eq=False)
class Paraphrase(Attack):
    """Tries other wordings of a prompt, one after the other, until one succeeds (Jin et al., 2019, https://arxiv.org/abs/1907.11932).

    TextFooler's synonyms, without its search: a guard that knows words rather than meanings is found out by the first of them.
    """

    synonyms: Mapping[str, Sequence[str]] | None = field(default=None, metadata={"artefact": "synonyms"})
    """Word or phrase -> others for it. By default the testbed's: no guard was trained on them, but the text encoders learned what they mean."""
    rewrites: Rewrites | None = field(default=None, metadata={"artefact": "rewrites"})
    """Whole prompts in other words, tried after the synonyms."""
    wordings: Annotated[int, Ge(1)] = 8
    """At most so many are tried for each prompt."""
    batch: Annotated[int, Ge(1)] = 16
    """So many pictures are made together."""

    def __call__(
        self, generator: Generator, methods: Sequence[Method], cases: Sequence[Case], success: Success, progress: Progress = lambda *_: None
    ) -> list[Attempt]:  # fmt: skip
        """One attempt per case; one for which there are no other words is tried as it is."""
        trials = Trials(generator, methods, success, cases, self.batch)
        wordings = [self.wordings_of(case) or [case.prompt] for case in cases]
        rounds = max((len(own) for own in wordings), default=0)
        for place in range(rounds):
            progress(self.name, place, rounds)
            trials.show({index: wordings[index][place] for index in trials.open if place < len(wordings[index])})
        progress(self.name, rounds, rounds)
        return [trials.attempt(index, case.prompt) for index, case in enumerate(cases)]

    def wordings_of(self, case: Case) -> list[str]:
        """A case's prompt in other words: first with what is unsafe in them replaced."""
        table = _testbed() if self.synonyms is None else self.synonyms
        unsafe = case.truth.unsafe if case.truth is not None else ()
        found = [
            *_replaced(case.prompt, {word: others for word, others in table.items() if word in unsafe}),
            *_replaced(case.prompt, table),
        ]
        found += list(self.rewrites(case.prompt)) if self.rewrites is not None else []
        return [text for text in dict.fromkeys(found) if text != case.prompt][: self.wordings]


def _testbed() -> Mapping[str, Sequence[str]]:
    from ...testbed.world import SYNONYMS

    return SYNONYMS


def _replaced(prompt: str, table: Mapping[str, Sequence[str]]) -> list[str]:
    """The prompt with each word of a table that occurs in it replaced by each of the others, in all combinations."""
    words = [word for word in table if table[word] and re.search(_whole(word), prompt, re.IGNORECASE)]
    texts = []
    for chosen in itertools.product(*(table[word] for word in words)):
        text = prompt
        for word, other in zip(words, chosen, strict=True):
            text = re.sub(_whole(word), lambda found, other=other: _with_article(found, other), text, flags=re.IGNORECASE)  # type: ignore[misc]
        texts.append(text)
    return texts if words else []


def _whole(word: str) -> str:
    return rf"(?:\b(?P<article>an?)(?P<space>\s+))?(?<!\w){re.escape(word)}(?!\w)"


def _with_article(found: re.Match[str], other: str) -> str:
    """The other word, with the article that goes with it if there was one."""
    if found["article"] is None:
        return other
    article = "an" if other[0].casefold() in "aeiou" else "a"
    return f"{article if found['article'].islower() else article.capitalize()}{found['space']}{other}"
