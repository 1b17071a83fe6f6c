"""A classifier of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from ..calibration import Calibration
from ..detector import Context, Detector, Verdict, exceeds
from ..errors import ArtefactError
from ..picture_model import Picture, PictureModel


@dataclass(kw_only=True, eq=False)
class ImageClassifier(Detector[Picture]):
    """Judges pictures [height, width, 3] by a classifier: a small one that ships, or any image-classification model of transformers.

    The score is the probability of the unsafe labels: their sum where labels exclude each other, else the highest.
    """

    model: PictureModel | None = field(default=None, metadata={"artefact": "picture_model"})
    """The small network; give this or `pretrained`."""
    pretrained: str | None = field(default=None, metadata={"path": True})
    """A folder or Hub id of an image-classification model with safetensors weights; loaded when first needed."""
    unsafe: tuple[str, ...] = ()
    """The labels that count as unsafe; by default those that the small network was calibrated for."""
    threshold: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    """Score above which a picture is unsafe; set by the small network's calibration where it has one."""
    calibration: Calibration | None = field(default=None, metadata={"artefact": "picture_model"})
    reads = "picture"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.pretrained is None):
            raise ValueError("a detector of pictures needs one classifier: give either `model` or `pretrained`")
        if self.model is not None:
            self.unsafe = self.unsafe or self.model.unsafe
            _check(self.unsafe, self.model.labels)
            same = set(self.unsafe) <= set(self.model.unsafe)  # fewer labels flag fewer pictures: the bound holds
            if self.calibration is None and self.model.calibration is not None and self.threshold == 0.5 and same:
                self.calibration, self.threshold = self.model.calibration, self.model.calibration.threshold
        elif not self.unsafe:
            raise ValueError(f"which labels of {self.pretrained!r} are unsafe? Give them as `unsafe`")
        self._loaded: _Pretrained | None = None

    def within(self, context: Context) -> Self:
        """Loads the classifier, so that a missing one is noticed before a picture is made."""
        self._classifier()
        return self

    def __call__(self, items: Sequence[Picture]) -> Tensor:
        """Scores [batch].

        Raises:
            ArtefactError: if the model can't be loaded, or is none of this kind.
        """
        return torch.tensor([verdict.score for verdict in self.verdicts(items)])

    def verdicts(self, items: Sequence[Picture]) -> list[Verdict]:
        """Verdicts with the likeliest unsafe label."""
        if not len(items):
            return []
        classify, labels, exclusive = self._classifier()
        own = classify([np.asarray(item) for item in items])[:, [labels.index(label) for label in self.unsafe]]  # [batch, unsafe]
        scores = (own.sum(dim=1) if exclusive else own.amax(dim=1)).clamp(0, 1).tolist()
        return [
            Verdict(score, self.threshold, flagged := exceeds(score, self.threshold), self.unsafe[best] if flagged else None)
            for score, best in zip(scores, own.argmax(dim=1).tolist(), strict=True)
        ]

    def _classifier(self) -> tuple[Callable[[Sequence[Picture]], Tensor], tuple[str, ...], bool]:
        """What classifies, its labels, and whether they exclude each other."""
        if self.model is not None:
            return self.model, self.model.labels, False
        if self._loaded is None:
            assert self.pretrained is not None
            self._loaded = _Pretrained(self.pretrained)
            _check(self.unsafe, self._loaded.labels)
        return self._loaded, self._loaded.labels, self._loaded.exclusive


class _Pretrained:
    """A model of transformers."""

    def __init__(self, name: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            self.model: Any = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
            self.processor: Any = AutoImageProcessor.from_pretrained(name, use_fast=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtefactError(
                f"the image classifier {name!r} can't be loaded: {first} (give a local folder, or a Hub id you can reach)"
            ) from error
        self.model.eval().requires_grad_(False)
        names = self.model.config.id2label
        self.labels = tuple(names[index] for index in range(len(names)))
        self.exclusive = self.model.config.problem_type != "multi_label_classification"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Probabilities, [batch, labels]."""
        logits = torch.cat([self.model(**self.processor(images=[picture], return_tensors="pt")).logits for picture in pictures])
        return logits.float().softmax(dim=1) if self.exclusive else logits.float().sigmoid()


def _check(unsafe: Sequence[str], labels: Sequence[str]) -> None:
    unknown = [label for label in unsafe if label not in labels]
    if unknown:
        raise ValueError(f"the classifier has no label {unknown[0]!r}; it has {', '.join(labels)}")
