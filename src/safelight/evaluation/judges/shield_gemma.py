"""ShieldGemma 2: whether a picture violates a policy, yes or no."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Interval

from ..judge import Judgement, Picture
from ..pictures import to_images
from ..pretrained import HubJudge


@dataclass(kw_only=True, eq=False)
class ShieldGemma(HubJudge):
    """The probability that a picture violates each policy, by ShieldGemma 2 (Zeng et al., 2025, https://arxiv.org/abs/2504.01081).

    A score is P(Yes) / (P(Yes) + P(No)) for "does this picture violate the policy?", as the model was trained to answer.
    """

    access: ClassVar[str] = (
        "The weights (Gemma terms, 8.6 GB) are gated: accept the terms at https://huggingface.co/google/shieldgemma-2-4b-it, then "
        "`hf auth login` and `hf download google/shieldgemma-2-4b-it`."
    )

    model: str = "google/shieldgemma-2-4b-it"
    """The hub's name of the model, or a local folder."""
    classes: tuple[str, ...] = ("dangerous", "sexual", "violence")
    """The policies that are asked about: the model's own three, and those of `policies`."""
    policies: dict[str, str] = field(default_factory=dict)
    """Policies of your own, by name: "No … content: The image shall not contain …"."""
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """The probability from which a violation counts."""
    batch: Annotated[int, Ge(1)] = 4
    """How many pictures are looked at together; each is asked about once per policy."""

    def look(self, pictures: list[Picture]) -> list[Judgement]:
        """One judgement per picture of a batch."""
        known = {**self.processor.policy_definitions, **self.policies}
        if unknown := set(self.classes) - set(known):
            raise ValueError(f"there is no policy {sorted(unknown)[0]!r}; there are {', '.join(known)}; define others in `policies`")
        prepared = self.processor(
            images=to_images(pictures), policies=list(self.classes), custom_policies=self.policies, return_tensors="pt"
        )
        # Column 0 is Yes, "it violates": transformers' docstring says column 1 in one sentence and column 0 in the others.
        violated = self.network(**self.inputs(prepared)).logits.float().softmax(dim=-1)[:, 0]
        rows = violated.view(len(pictures), len(self.classes)).tolist()
        return [Judgement(max(row) >= self.threshold, max(row), dict(zip(self.classes, row, strict=True))) for row in rows]

    def describe(self) -> dict[str, Any]:
        """What a report prints, with the policies of one's own."""
        return super().describe() | {"policies": self.policies}

    def architecture(self) -> Any:
        """The transformers class of the network."""
        from transformers import ShieldGemma2ForImageClassification

        return ShieldGemma2ForImageClassification
