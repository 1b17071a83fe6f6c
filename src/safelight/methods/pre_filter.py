"""Judge the pictures that go in, then refuse: the mirror of `post_filter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..detector import Detector, Verdict
from ..flow import Call
from ..method import Method
from ..pictures import greyed, judge
from ..run import Run


@dataclass(kw_only=True, eq=False)
class PreFilter(Method):
    """Judges each picture that goes into the pipeline, and withholds what would be made of a flagged one.

    The safety checker (Rando et al., 2022, https://arxiv.org/abs/2210.04610), turned around: sources, masks, references, control images and
    pictures for IP-Adapters are judged as they are given, and again as the autoencoder gets them, resized and cropped. The images that a
    flagged picture goes into are replaced by plain grey ones; the rest of the batch is left as it is. What can't be judged (given latents,
    embeddings of pictures) is refused.
    """

    detector: Detector[Any] = field(metadata={"artefact": "picture_model"})
    """Tells which pictures are unsafe."""
    judges_images = True

    def __post_init__(self) -> None:
        if self.detector.reads != "picture":
            raise ValueError(
                f"pre_filter judges pictures, and {type(self.detector).__name__} reads prompts; use image_classifier, or `block`"
            )

    def meet(self, further: Run) -> None:
        """It looks at the pictures that go in, whatever the prompt."""

    def begin(self) -> None:
        """Judges the pictures among the pipeline's arguments.

        Raises:
            SafetyBypassed: for one that can't be judged.
        """
        self.detector = self.detector.within(self.run)
        self.flagged: set[int] = set()
        self.taken_in: list[Verdict] = []
        pixels = [(given, picture) for given in self.run.pictures for picture in given.pixels()]
        verdicts = self.detector.verdicts([picture for _, picture in pixels]) if pixels else []
        self.pending = [(given, verdict) for (given, _), verdict in zip(pixels, verdicts, strict=True)]
        if self.run.images:
            self._settle()

    def take_in(self, images: Tensor) -> None:
        """Judges pictures as the autoencoder gets them."""
        self.taken_in += judge(self.detector, images)
        if self.run.index:  # in a callback, after all others
            self._settle()

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Finds out whose pictures were judged, where only the denoiser tells how many images there are."""
        self._settle()
        return denoise(call)

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        """Greys out what was made of flagged pictures."""
        for image in self.flagged:
            self.note(image, action="refused", strength=1.0)
        return decode(greyed(images, sorted(self.flagged)))

    def _settle(self) -> None:
        count = self.run.images
        for given, verdict in self.pending:
            self._note(given.images(count), verdict, f"`{given.name}`")
        each = len(self.taken_in) % count == 0  # one for each image: in one call, or one by one where each has its own generator
        for place, verdict in enumerate(self.taken_in):
            self._note([place % count] if each else range(count), verdict, "a picture, as the autoencoder gets it")
        self.pending, self.taken_in = [], []

    def _note(self, images: Iterable[int], verdict: Verdict, what: str) -> None:
        """Fills in the most alarming verdict on the pictures of each image."""
        for image in images:
            action = self.run.action(self.position, image, self.name)
            if action.score is None or (verdict.flagged, verdict.score) > (action.flagged, action.score):
                self.note_verdict(image, verdict)
                self.note(image, note=f"{what}: {verdict.note}" if verdict.note else what)
            if verdict.flagged:
                self.flagged.add(image)
