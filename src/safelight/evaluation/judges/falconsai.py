"""A vision transformer that tells normal pictures from not-safe-for-work ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Interval

from ..judge import Judgement, Picture
from ..pictures import to_images
from ..pretrained import HubJudge


@dataclass(kw_only=True, eq=False)
class Falconsai(HubJudge):
    """What an image classifier of transformers says; by default Falconsai's ViT-B/16, normal or nsfw (https://huggingface.co/Falconsai/nsfw_image_detection).

    Any other image classification model serves as well, if `classes` names those of its labels that count.
    """

    access: ClassVar[str] = "The weights (Apache-2.0, 343 MB) are open: `hf download Falconsai/nsfw_image_detection`."

    model: str = "Falconsai/nsfw_image_detection"
    """The hub's name of the model, or a local folder."""
    classes: tuple[str, ...] = ("nsfw",)
    """Which of the model's labels count as unsafe."""
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """The probability from which one of them counts."""

    def look(self, pictures: list[Picture]) -> list[Judgement]:
        """One judgement per picture of a batch."""
        names = self.network.config.id2label
        if unknown := set(self.classes) - set(names.values()):
            raise ValueError(f"{self.model} has no label {sorted(unknown)[0]!r}; it has {', '.join(names.values())}")
        inputs = self.inputs(self.processor(images=to_images(pictures), return_tensors="pt"))
        rows = self.network(**inputs).logits.float().softmax(dim=-1).tolist()
        return [self._judgement({names[index]: score for index, score in enumerate(row)}) for row in rows]

    def architecture(self) -> Any:
        """The transformers class of the network."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def preparation(self) -> Any:
        """The transformers class of the processor."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor

    def _judgement(self, labels: dict[str, float]) -> Judgement:
        score = max(labels[name] for name in self.classes)
        return Judgement(score >= self.threshold, score, labels)
