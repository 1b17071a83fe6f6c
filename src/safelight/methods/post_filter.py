"""Judge the picture, then refuse: what most services do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..detector import Detector
from ..method import Method
from ..pictures import greyed, judge
from ..run import Run


@dataclass(kw_only=True, eq=False)
class PostFilter(Method):
    """Judges each finished picture and withholds flagged ones, in the manner of the safety checker (Rando et al., 2022, https://arxiv.org/abs/2210.04610).

    A flagged picture is replaced by a plain grey one; the rest of the batch is left as it is. The prompt is not looked at.
    """

    detector: Detector[Any] = field(metadata={"artefact": "picture_model"})
    """Tells which pictures are unsafe."""

    def __post_init__(self) -> None:
        if self.detector.reads != "picture":
            raise ValueError(
                f"post_filter judges pictures, and {type(self.detector).__name__} reads prompts; use image_classifier, or `block`"
            )

    judges_images = True
    judges_finished = True

    def meet(self, further: Run) -> None:
        """It looks at the finished picture, whatever the prompt."""

    def begin(self) -> None:
        """Makes the detector ready, so that one that can't be had is noticed before a picture is made."""
        self.detector = self.detector.within(self.run)

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        """Greys out flagged pictures."""
        chosen = [image for image in range(len(images)) if self.confined_to is None or image in self.confined_to]
        flagged = []
        for image, verdict in zip(chosen, judge(self.detector, images[chosen]) if chosen else [], strict=True):
            self.note_verdict(image, verdict)
            if verdict.flagged:
                self.note(image, action="refused", strength=1.0)
                flagged.append(image)
        return decode(greyed(images, flagged))
