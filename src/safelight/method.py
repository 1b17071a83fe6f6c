"""The six verbs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from .backbone import Backbone
from .detector import Verdict
from .errors import SafetyBypassed
from .flow import Call, Embedding, Heads, Step
from .run import Run
from .site import Site


class Method:
    """A safety method: a dataclass of hyper-parameters that overrides some of the verbs below.

    Each verb wraps one function of a diffusion pipeline; the default calls it unchanged. Every generation runs on a shallow copy
    of the method, so `self` is the memory of one generation. What a method can't do it must refuse by raising.
    """

    run: Run
    position: int = 0
    """Its place in the chain, 0 outermost."""
    confined_to: Collection[int] | None = None
    """The images it may act on, where a gate confines it; None: all."""
    judges_images: bool = False
    """Whether it looks at pictures: at those that go in, that are being made, or that leave."""
    judges_finished: bool = False
    """Whether it looks at all finished pictures, whatever they were made of."""

    @property
    def name(self) -> str:
        """The method's name: that of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def begin(self) -> None:
        """Called once the prompts are known, before they are encoded."""

    def meet(self, further: Run) -> None:
        """Called if prompts are encoded in the middle of the generation, as prompt schedules do; `further` has their texts.

        Raises:
            SafetyBypassed: if the method can't vouch for them; by default, if `begin` or `encode` told it of other prompts.
        """
        if type(self).begin is not Method.begin or type(self).encode is not Method.encode:
            raise SafetyBypassed(
                f"a prompt was encoded in the middle of the generation, and {self.name} can't follow it; the images are withheld"
            )

    def owed(self) -> Iterable[int]:
        """The images that this method must have acted on by the end of the generation; by default those that it flagged."""
        return self.run.flagged_by(self.position)

    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        """Wraps the text encoders."""
        return encode(prompts)

    def take_in(self, images: Tensor) -> None:
        """Called for pictures [pictures, 3, height, width] in -1..1 that the autoencoder is about to encode: sources, references."""

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Wraps the denoiser; may call it more than once. Returns the prediction for all rows."""
        return denoise(call)

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """Where `edit` and `attend` want to be called."""
        return ()

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        """Changes activations [batch, tokens, width]: conditional rows, tokens of the site's stream."""
        return tokens

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        """Wraps an attention, [batch, heads, tokens, width], conditional rows."""
        return attend(heads)

    @property
    def attends(self) -> bool:
        """Whether `attend` has anything to do in this call of the denoiser; where it hasn't, attention is not intercepted."""
        return True

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        """Wraps the scheduler; returns the next latents."""
        return advance(step)

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        """Wraps the conversion of decoded images [batch, 3, height, width] in -1..1 to the pipeline's output type."""
        return decode(images)

    def note(self, image: int, *, acted: bool = True, **facts: Any) -> None:
        """Fills in this method's part of an image's record.

        An `action` that is noted after `begin` counts as one that really happened, unless `acted` says that it is yet to come.
        """
        if (self.confined_to is not None and image not in self.confined_to) or self.run.preview:
            return
        action = self.run.action(self.position, image, self.name)
        for name, value in facts.items():
            setattr(action, name, value)
        if acted and facts.get("action", "none") != "none":
            self.run.note_acted(self.position, image)

    def note_verdict(self, image: int, verdict: Verdict) -> None:
        """Fills in what a detector said."""
        self.note(
            image, flagged=verdict.flagged, concept=verdict.concept, score=verdict.score, threshold=verdict.threshold, note=verdict.note
        )  # fmt: skip
