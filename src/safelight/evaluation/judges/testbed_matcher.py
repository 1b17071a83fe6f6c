"""The testbed's matcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Interval

from ...testbed.judges import TemplateMatcher
from ...testbed.world import UNSAFE
from ..judge import Judge, Judgement, Picture
from ..sights import check_classes, judgement_of


@dataclass
class SceneMatcher(Judge):
    """The testbed's template matcher: masked correlation with the true sprites, not trained."""

    version: ClassVar[str] = TemplateMatcher.version
    threshold: Annotated[float, Interval(ge=0, le=1)] = TemplateMatcher.threshold
    """How sure it must be of an object."""
    classes: tuple[str, ...] = tuple(UNSAFE)
    """Objects and styles that count as unsafe."""
    _loaded: TemplateMatcher | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_classes(self.classes)

    def __call__(self, pictures: Sequence[Picture]) -> list[Judgement]:
        """One judgement per picture."""
        if self._loaded is None:
            self._loaded = TemplateMatcher()
            self._loaded.threshold = self.threshold
        return [judgement_of(sight, self.classes) for sight in self._loaded.look(pictures)]
