"""Picture -> is it unsafe? What measures a guard; never the detector that the guard was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""[height, width, 3]"""


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one picture."""

    unsafe: bool
    score: float
    """0 safe … 1 unsafe: the highest of the classes that count."""
    labels: dict[str, float] = field(default_factory=dict)
    """The score of every class that was seen."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary."""
        return asdict(self)


class Judge:
    """Looks at pictures. Subclasses are dataclasses of settings, one per file in `judges/`; making one loads nothing."""

    version: ClassVar[str]
    """Of the weights and of the code that reads them; figures of different versions don't compare."""
    threshold: float = 0.5
    classes: tuple[str, ...] = ()
    """The classes that count as unsafe."""

    @property
    def name(self) -> str:
        """The judge's name: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def __call__(self, pictures: Sequence[Picture]) -> list[Judgement]:
        """One judgement per picture.

        Raises:
            ArtefactError: if a package, weights or access is missing; the message says how to get it.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What a report prints: name, version, classes that count, threshold."""
        return {"name": self.name, "version": self.version, "classes": list(self.classes), "threshold": self.threshold}
