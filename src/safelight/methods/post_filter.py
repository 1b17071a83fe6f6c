"""Judge the picture, then refuse: what most services do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..detector import Detector, Verdict
from ..method import Method
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

    def meet(self, further: Run) -> None:
        """It looks at the finished picture, whatever the prompt."""

    def begin(self) -> None:
        """Makes the detector ready, so that one that can't be had is noticed before a picture is made."""
        self.detector = self.detector.within(self.run)

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        """Greys out flagged pictures."""
        chosen = [image for image in range(len(images)) if self.confined_to is None or image in self.confined_to]
        flagged = []
        for image, verdict in zip(chosen, self._verdicts(images[chosen]) if chosen else [], strict=True):
            self.note_verdict(image, verdict)
            if verdict.flagged:
                self.note(image, action="refused", strength=1.0)
                flagged.append(image)
        if flagged:
            images = images.clone()
            images[flagged] = torch.zeros((), dtype=images.dtype, device=images.device)
        return decode(images)

    def _verdicts(self, images: Tensor) -> list[Verdict]:
        """Verdicts on pictures [batch, 3, height, width] in -1..1; one with NaN in it can't be judged, and counts as unsafe."""
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = ((images.nan_to_num(0.0).float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        verdicts = self.detector.verdicts(list(pixels.permute(0, 2, 3, 1).cpu().numpy()))
        threshold = self.detector.threshold
        unjudged = Verdict(1.0, threshold, True, note="the picture has values that are not finite, hence treated as unsafe")
        return [verdict if sound else unjudged for verdict, sound in zip(verdicts, finite, strict=True)]
