"""One generation, as its methods see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backbone import Backbone
from .detector import Detector, Verdict, highest
from .errors import PromptRequired, UnsupportedPipeline
from .flow import Call, Embedding
from .record import Action, Record
from .site import Layout


class Run:
    """The state of one generation: what was asked, how far it is, what methods recorded."""

    def __init__(self, backbone: Backbone, encode_prompt: Callable[..., Any], wordings: Sequence[tuple[str, ...]] | None) -> None:
        self.backbone = backbone
        self.wordings = wordings
        """For each image, every text that describes it (FLUX takes one per text encoder); None: embeddings only."""
        self.images = len(wordings) if wordings is not None else 0
        """How many images are being made; with embeddings only, known from the first denoiser call on."""
        self.index = 0
        """Steps done."""
        self._call: Call | None = None
        self._layout: Layout | None = None
        self.events: list[dict[str, Any]] = []
        """What methods recorded, in order: reports, audit log, the UI's timeline."""
        self.margins: list[tuple[tuple[int, ...], Tensor]] | None = None
        """Of an attack through the guard: for each decision, the images and by how much they exceed its limit, with the graph."""
        self._actions: dict[tuple[int, int], Action] = {}
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
    def total(self) -> int:
        """How many steps there will be."""
        return int(self.backbone.pipe.num_timesteps)

    @property
    def progress(self) -> float:
        """0 at the first step, 1 after the last."""
        return self.index / self.total

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
        """A verdict per image: the most alarming over all texts that describe it; equal texts are judged once.

        Raises:
            ValueError: if the detector reads pictures.
        """
        if detector.reads != "prompt":
            raise ValueError(
                f"{type(detector).__name__} judges pictures, and this guard judges prompts; give it another, or use post_filter"
            )
        self.prompts  # raises without texts  # noqa: B018
        views = {text: self.backbone.windows(text) for wording in self.wordings or () for text in wording}
        texts = list(dict.fromkeys(piece for pieces in views.values() for piece in pieces))
        pieces = [[piece for text in wording for piece in views[text]] for wording in self.wordings or ()]
        working = detector.within(self)
        verdicts = dict(zip(texts, working.verdicts(texts), strict=True))
        if self.margins is not None:
            margins = dict(zip(texts, working.margins(texts, [verdicts[text] for text in texts]), strict=True))
            self.weigh(range(self.images), torch.stack([torch.stack([margins[piece] for piece in own]).amax() for own in pieces]), 0.0)
        return [highest([verdicts[piece] for piece in own]) for own in pieces]

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

    def records(self, methods: int) -> list[Record]:
        """One record per image."""
        prompts = self.prompts if self.wordings is not None else [None] * self.images
        return [
            Record(prompt, [self._actions[p, image] for p in range(methods) if (p, image) in self._actions])
            for image, prompt in enumerate(prompts)
        ]
