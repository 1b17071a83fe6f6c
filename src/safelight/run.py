"""One generation, as its methods see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backbone import Backbone
from .detector import Detector, Verdict, highest
from .errors import PromptRequired, SafetyBypassed, UnsupportedPipeline
from .flow import Call, Embedding, put
from .pictures import GivenPicture
from .reading import Read
from .record import Action, Negative, Record
from .site import Layout


class Run:
    """The state of one generation: what was asked, how far it is, what methods recorded."""

    def __init__(self, backbone: Backbone, encode_prompt: Callable[..., Any], wordings: Sequence[tuple[str, ...]] | None) -> None:
        self.backbone = backbone
        self.wordings = wordings
        """For each image, every text that describes it (FLUX takes one per text encoder); None: embeddings only."""
        self.images = len(wordings) if wordings is not None else 0
        """How many images are being made; with embeddings only, known from the first denoiser call on."""
        self.readings: list[Read] = []
        """For each image, what the text encoders read beyond its texts."""
        self.negative_texts: list[list[str]] | None = []
        """Negative prompts as they were given, for each text encoder that has its own; None: embeddings only."""
        self.pictures: list[GivenPicture] = []
        """What goes into the images besides text."""
        self.unjudged: list[str] = []
        """The arguments of those, if no method looks at pictures."""
        self.preview = False
        """Whether images are being decoded before the last step, for somebody to look at."""
        self.index = 0
        """Steps done."""
        self._call: Call | None = None
        self._layout: Layout | None = None
        self.events: list[dict[str, Any]] = []
        """What methods recorded, in order: reports, audit log, the UI's timeline."""
        self.margins: list[tuple[tuple[int, ...], Tensor]] | None = None
        """Of an attack through the guard: for each decision, the images and by how much they exceed its limit, with the graph."""
        self._actions: dict[tuple[int, int], Action] = {}
        self._acted: set[tuple[int, int]] = set()
        self._negative: dict[int, Negative] = {}
        self._left_out: tuple[Tensor, tuple[int, ...], Call] | None = None
        self._flagged_texts: set[str] = set()
        self._begun = False
        self._encode_prompt = encode_prompt

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image.

        Raises:
            PromptRequired: if the pipeline was given embeddings without their text.
        """
        if self.wordings is None:
            raise PromptRequired("this guard reads the prompt, but the pipeline was given `prompt_embeds` alone; pass `prompt` instead")
        return [wording[0] for wording in self.wordings]

    @property
    def plain_prompts(self) -> list[str]:
        """The prompt of each image, for safe guidance to start from.

        Of one into which markers of text encoders were typed, the first piece that no detector flagged: such a prompt is put together to mislead.
        """
        readings = self.readings or [Read() for _ in range(self.images)]
        return [
            next((piece for piece in read.pieces if piece not in self._flagged_texts), "") if read.pieces else prompt
            for prompt, read in zip(self.prompts, readings, strict=True)
        ]

    @property
    def total(self) -> int:
        """How many steps there will be."""
        return int(self.backbone.pipe.num_timesteps)

    @property
    def skipped(self) -> int:
        """How many steps of the schedule come before the first one: image to image begins at a lower noise level."""
        timesteps = getattr(self.backbone.pipe.scheduler, "timesteps", None)
        return 0 if timesteps is None else max(0, len(timesteps) - self.total)

    @property
    def progress(self) -> float:
        """How much of the noise schedule is done: 0 at pure noise, 1 after the last step."""
        return (self.skipped + self.index) / (self.skipped + self.total)

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each step, 1 for pure noise; of schedulers that work with noise levels (flow matching).

        Raises:
            UnsupportedPipeline: if the scheduler has none.
        """
        sigmas = getattr(self.backbone.pipe.scheduler, "sigmas", None)
        if sigmas is None:
            raise UnsupportedPipeline(
                f"{type(self.backbone.pipe.scheduler).__name__} has no noise levels; give a share of the steps instead"
            )
        return [float(sigma) for sigma in sigmas.tolist()[-1 - self.total : -1]]  # the last one, 0, follows the last step

    @property
    def call(self) -> Call | None:
        """The denoiser call under way."""
        return self._call

    @call.setter
    def call(self, call: Call | None) -> None:
        self._call, self._layout = call, self._layout if call is None else call.layout

    @property
    def layout(self) -> Layout:
        """The tokens of the latest call."""
        assert self._layout is not None, "there is no layout before the first denoiser call"
        return self._layout

    def encode(self, prompts: str | Sequence[str]) -> Embedding:
        """Embeds prompts as the pipeline does, outside the chain of methods."""
        return self.backbone.embed([prompts] if isinstance(prompts, str) else prompts, self._encode_prompt)

    def pool(self, prompts: Sequence[str]) -> Tensor:
        """The pipeline's pooled embeddings of prompts, [batch, width]."""
        return self.backbone.pool(prompts, self._encode_prompt)

    def judge(self, detector: Detector[str]) -> list[Verdict]:
        """A verdict per image: the most alarming over all texts that describe it, and over what encoders read in them.

        Equal texts are judged once. Negative prompts are judged too, for the record: that one names what is unsafe is no reason to flag an image.

        Raises:
            PromptRequired: if a text, or a negative one, is known by its embedding only.
            ValueError: if the detector reads pictures.
        """
        if detector.reads != "prompt":
            raise ValueError(
                f"{type(detector).__name__} judges pictures, and this guard judges prompts; give it another, or use pre_filter or post_filter"
            )
        self.prompts  # raises without texts  # noqa: B018
        if self.negative_texts is None:
            raise PromptRequired(
                "this guard reads negative prompts, and the pipeline was given `negative_prompt_embeds` alone; pass `negative_prompt` instead"
            )
        readings = self.readings or [Read() for _ in range(self.images)]
        described = [(*wording, *read.texts) for wording, read in zip(self.wordings or (), readings, strict=True)]
        excluded = [self.negatives_of(image) for image in range(self.images)]
        views = {text: self.backbone.windows(text) for texts in (*described, *excluded) for text in texts}
        texts = list(dict.fromkeys(piece for pieces in views.values() for piece in pieces))
        pieces = [[piece for text in own for piece in views[text]] for own in described]
        working = detector.within(self)
        verdicts = dict(zip(texts, working.verdicts(texts), strict=True))
        self._flagged_texts |= {text for text in views if any(verdicts[piece].flagged for piece in views[text])}
        if self.margins is not None:
            margins = dict(zip(texts, working.margins(texts, [verdicts[text] for text in texts]), strict=True))
            self.weigh(range(self.images), torch.stack([torch.stack([margins[piece] for piece in own]).amax() for own in pieces]), 0.0)
        for image, negatives in enumerate(excluded):
            if negatives:
                self._note_negative(image, highest([verdicts[piece] for text in negatives for piece in views[text]]))
        found = [highest([verdicts[piece] for piece in own]) for own in pieces]
        if detector.reads_tokens:
            return found
        return [_unreadable(verdict, read) if read.opaque else verdict for verdict, read in zip(found, readings, strict=True)]

    def with_texts(self, wordings: Sequence[tuple[str, ...]], readings: list[Read]) -> Run:
        """This generation with other prompts, for detectors to judge."""
        other = Run(self.backbone, self._encode_prompt, wordings)
        other.readings = readings
        return other

    def negatives_of(self, image: int) -> tuple[str, ...]:
        """An image's negative texts, none of them empty; where they were given as embeddings, there are none to be had."""
        return tuple(dict.fromkeys(text for texts in self.negative_texts or () if (text := texts[image * len(texts) // self.images])))

    def refuse_unsafe(self, detector: Detector[str], who: str) -> None:
        """For prompts that are encoded when it is too late to do anything about them.

        Raises:
            SafetyBypassed: if any is unsafe.
        """
        for verdict in self.judge(detector):
            if verdict.flagged:
                raise SafetyBypassed(
                    f"a prompt that was encoded in the middle of the generation is unsafe ({verdict.concept or 'flagged'}, score "
                    f"{verdict.score:.3g} above {verdict.threshold:.3g}), and {who} can't change the generation any more; the images are withheld"
                )

    def _note_negative(self, image: int, verdict: Verdict) -> None:
        noted = self._negative_of(image)
        if noted.score is None or (verdict.flagged, verdict.score) > (noted.flagged, noted.score):
            noted.flagged, noted.concept, noted.score = verdict.flagged, verdict.concept, verdict.score

    def _negative_of(self, image: int) -> Negative:
        texts = None if self.negative_texts is None else ", ".join(self.negatives_of(image))
        return self._negative.setdefault(image, Negative(texts))

    def without_negatives(self, call: Call) -> Call:
        """The call with an empty negative prompt for images that were found unsafe: theirs must not lead them back."""
        images = tuple(image for image in sorted(self.flagged) if self.negative_texts is None or self.negatives_of(image))
        rows = slice(0, call.cond.start) if call.conditional else slice(0, len(call.text))
        if not images or rows.stop - rows.start < self.images:
            return call
        if self._left_out is None or self._left_out[0] is not call.text or self._left_out[1] != images:
            empty, pooled = self.encode(""), call.pooled
            if pooled is not None and empty.pooled is not None:
                pooled = put(pooled, list(images), empty.pooled.to(pooled))
            self._left_out = call.text, images, replace(call, text=put(call.text, list(images), empty.text.to(call.text)), pooled=pooled)
            for image in images:
                self._negative_of(image).left_out = True
        return replace(call, text=self._left_out[2].text, pooled=self._left_out[2].pooled)

    @property
    def flagged(self) -> set[int]:
        """The images that any method found unsafe so far."""
        return {image for (_, image), action in self._actions.items() if action.flagged}

    def flagged_by(self, position: int) -> list[int]:
        """The images that the method at `position` of the chain found unsafe."""
        return [image for (own, image), action in self._actions.items() if own == position and action.flagged]

    def note_acted(self, position: int, image: int) -> None:
        """Remembers that a method really changed something; what is announced before the denoiser is first called doesn't count."""
        if self._begun:
            self._acted.add((position, image))

    def begin(self) -> None:
        """From now on methods can act."""
        self._begun = True

    def check_acted(self, position: int, name: str, owed: Iterable[int]) -> None:
        """Raises SafetyBypassed if a method did nothing about an image for which it owed something."""
        for image in owed:
            if (position, image) not in self._acted:
                action = self._actions.get((position, image))
                why = "found it unsafe, and" if action is not None and action.flagged else "was to act on it, and"
                raise SafetyBypassed(
                    f"{name} {why} did nothing about image {image}"
                    + (f" ({action.note})" if action is not None and action.note else "")
                    + "; the images are withheld. Does its schedule leave it a step to act in?"
                )

    def weigh(self, images: Iterable[int], scores: Tensor, limits: Sequence[float] | Sequence[Sequence[float]] | float) -> None:
        """Tells an attack that goes through the guard what a decision hung on; otherwise does nothing.

        A decision has no gradient; by how much `scores` [images] or [images, concepts] exceed `limits` has one.
        """
        if self.margins is not None:
            margins = scores - torch.tensor(limits, dtype=scores.dtype, device=scores.device)
            self.margins.append((tuple(images), margins if margins.ndim == 1 else margins.amax(dim=1)))

    def record(self, event: str, **facts: Any) -> None:
        """Notes an event of this step."""
        self.events.append({"event": event, "step": self.index, **facts})

    def action(self, position: int, image: int, method: str) -> Action:
        """What the method at `position` of the chain does to an image, to be filled in."""
        return self._actions.setdefault((position, image), Action(method))

    def records(self, positions: Iterable[int]) -> list[Record]:
        """One record per image, of the methods at some positions of the chain."""
        prompts = self.prompts if self.wordings is not None else [None] * self.images
        places = list(positions)
        return [
            Record(
                prompt,
                [self._actions[place, image] for place in places if (place, image) in self._actions],
                self._negative_of(image) if self.negative_texts is None or self.negatives_of(image) else None,
                list(self.readings[image].texts) if self.readings else [],
                self.unjudged,
            )
            for image, prompt in enumerate(prompts)
        ]


def _unreadable(verdict: Verdict, read: Read) -> Verdict:
    """The verdict of a detector that reads words on a prompt with learned tokens that are like no word: nobody knows what they stand for."""
    if verdict.flagged:
        return verdict
    note = (
        f"no word comes near the learned token {read.opaque[0]!r}, so a detector that reads words can't judge it, hence treated as unsafe"
    )
    return replace(verdict, score=1.0, flagged=True, note=note)
