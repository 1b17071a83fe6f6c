"""Refusal, as a baseline: detect, then withhold the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..detector import Detector
from ..flow import Embedding
from ..method import Method
from ..pictures import greyed
from ..run import Run


@dataclass(kw_only=True, eq=False)
class Block(Method):
    """Refuses flagged prompts, in the manner of the safety checker (Rando et al., 2022, https://arxiv.org/abs/2210.04610).

    A flagged prompt is emptied before it is encoded, and its picture is replaced by a plain grey one; the rest of the batch is left as it is.
    """

    detector: Detector[str] = field(metadata={"artefact": "bank"})
    """Tells which prompts are unsafe."""

    def begin(self) -> None:
        """Judges the prompts."""
        verdicts = self.run.judge(self.detector)
        self.flagged = [image for image, verdict in enumerate(verdicts) if verdict.flagged]
        for image, verdict in enumerate(verdicts):
            self.note_verdict(image, verdict)
            if verdict.flagged:
                self.note(image, action="refused", strength=1.0)

    def meet(self, further: Run) -> None:
        """Judges prompts that come late."""
        further.refuse_unsafe(self.detector, self.name)

    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        """Empties flagged prompts: nothing unsafe is even begun."""
        copies = max(1, self.run.images // max(1, len(prompts)))
        refused = {image // copies for image in self.flagged}
        return encode(["" if index in refused else prompt for index, prompt in enumerate(prompts)])

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        """Greys out flagged pictures."""
        for image in self.flagged:
            self.note(image, action="refused")
        return decode(greyed(images, self.flagged))
