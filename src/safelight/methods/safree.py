"""SAFREE, as a baseline: words that bring a prompt near a toxic subspace are projected out of it, for as long as that seems needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval, MinLen
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..backbone import Backbone
from ..flow import Call, Embedding, put
from ..method import Method
from ..site import Site
from ..spectrum import attenuate, grid_of
from ..subspace import basis, onto, out_of, standing_out
from ..tokens import extent, word_spans

Share = Annotated[float, Interval(ge=0, le=1)]
Spaces = list[tuple[Tensor, Tensor]]
FEATURES = ("up:image", "joint:image", "single:image")
"""Kinds of sites whose features are attenuated, where a backbone has them."""
CHUNK = 32
"""How many masked prompts are encoded at a time."""


@dataclass(frozen=True)
class _Filter:
    """What is done to the embedding of one wording."""

    words: tuple[str, ...]
    """The trigger words."""
    spaces: list[tuple[list[int], Tensor, Tensor]]
    """For each text encoder: the positions of trigger tokens, the basis of the input space, and that of the toxic subspace."""
    pooled: tuple[Tensor, Tensor] | None
    steps: int | None
    """In so many first steps; None: in all."""

    def __call__(self, text: Tensor, pooled: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """The filtered embedding: text [tokens, width], pooled [width]."""
        text = text.clone()
        for positions, inputs, toxic in self.spaces:
            kept = [position for position in positions if position < len(text)]
            own = text[kept].float()
            text[kept] = torch.lerp(own, out_of(toxic, onto(inputs, own)), strength).to(text)
        if pooled is not None and self.pooled is not None:
            inputs, toxic = self.pooled
            pooled = torch.lerp(pooled.float(), out_of(toxic, onto(inputs, pooled.float())), strength).to(pooled)
        return text, pooled


@dataclass(kw_only=True, eq=False)
class SAFREE(Method):
    """Projects trigger words out of the subspace that some concepts span, and weakens smooth features that this brings about.

    SAFREE (Yoon et al., 2024, https://arxiv.org/abs/2410.12761), without training, on every backbone. A word is a trigger where the prompt
    without it is farther from the concepts than the prompt without another word is on average. Here words are masked, not tokens, by leaving
    them out; features are those of decoder blocks (U-Net) or of all blocks (transformers) and not of skip connections, which no site reaches.
    It acts on every sample that has a trigger, and most prompts have one; `Gate` confines it to flagged samples.
    """

    concepts: Annotated[tuple[str, ...], MinLen(1)]
    """What should not be in the picture: words or phrases."""
    alpha: Annotated[float, Ge(0)] = 0.01
    """α: a word is a trigger if the distance without it exceeds the mean of the others by this share."""
    gamma: Annotated[float, Ge(0)] = 10.0
    """γ: the filtered prompt is used in γ·sigmoid(1 - cos) first steps, the cosine being that of the original and the filtered prompt."""
    validate: bool = True
    """Self-validating filtering; if off, the filtered prompt is used in all steps."""
    scale: Share = 0.9
    """s: the factor on low frequencies that the filtered prompt makes stronger; 1 turns this off, and saves a denoiser row per sample."""
    cutoff: Annotated[int, Ge(0)] = 1
    """Frequencies of at most so many periods per side are low."""
    strength: Share = 1.0
    """How far trigger words are led to their projection; 0: nothing is changed."""

    def begin(self) -> None:
        """Finds the trigger words of each prompt, and where they are led."""
        self.hearing, self.acting = False, list[int]()
        self.heard: dict[Site, Tensor] = {}
        self.run.prompts  # raises without texts  # noqa: B018
        wordings = self.run.wordings or ()
        chosen = [image for image in range(len(wordings)) if self.confined_to is None or image in self.confined_to]
        if not chosen or not self.strength or (self.validate and not self.gamma):
            self.filters: dict[int, _Filter] = {}
            return
        toxic = [basis(vectors) for vectors in self._vectors(self.concepts)]
        made = {wording: self._filter(wording, toxic) for wording in {wordings[image] for image in chosen}}
        self.filters = {image: found for image in chosen if (found := made[wordings[image]]) is not None}

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Predicts with filtered prompts, where filtering is due; before, listens to what the prompts themselves bring about."""
        acting = [place for place, image in enumerate(call.samples) if self._due(image)] if call.conditional else []
        if not acting:
            return denoise(call)
        if self.scale < 1:
            self.hearing, self.acting, self.heard = True, [], {}
            denoise(call.take(acting, conditional=True))
            self.hearing, self.acting = False, acting
        noise = denoise(self._filtered(call, acting))
        self.acting = []
        return noise

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """Where features are attenuated."""
        wanted = self.strength and self.scale < 1 and (self.gamma or not self.validate)
        return backbone.sites(*(kind for kind in FEATURES if kind in backbone.ports)) if wanted else ()

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        """Attenuates low frequencies that filtering made stronger."""
        if self.hearing:
            self.heard[site] = tokens
        if not self.acting:
            return tokens
        own = tokens[self.acting]
        grid = grid_of(tokens.shape[1], self.run.layout.grid)
        return put(tokens, self.acting, attenuate(own, self.heard[site].to(own), grid, self.scale, self.cutoff))

    def _due(self, image: int) -> bool:
        found = self.filters.get(image)
        return found is not None and (found.steps is None or self.run.index < found.steps)

    def _filtered(self, call: Call, acting: Sequence[int]) -> Call:
        own, pooled = call.text[call.cond], None if call.pooled is None else call.pooled[call.cond]
        text, changed = own.clone(), None if pooled is None else pooled.clone()
        for place in acting:
            image = call.samples[place]
            found = self.filters[image]
            text[place], led = found(own[place], None if pooled is None else pooled[place], self.strength)
            if changed is not None and led is not None:
                changed[place] = led
            steps = self.run.total if found.steps is None else min(found.steps, self.run.total)
            told = f"trigger words: {', '.join(found.words)}"
            self.note(image, action="filtered", steps=(0, steps), strength=self.strength, note=told)
        return call.with_text(text, changed)

    def _filter(self, wording: tuple[str, ...], toxic: list[Tensor]) -> _Filter | None:
        """The filter of one wording; None if it has no trigger words."""
        words = [text.split() for text in wording]
        names = [word for listed in words for word in listed]
        if not names:
            return None
        inputs = self._vectors([" ".join(listed[:i] + listed[i + 1 :]) for listed in words for i in range(len(listed))])
        spans = [[span for text in wording for span in _spans(*encoder, text)] for encoder in self.run.backbone.encoders]
        triggers = set[int]()  # of any encoder's: what one of them overlooks must not get through it
        for space, own, whole in zip(toxic[: len(spans)], inputs, self._vectors(wording), strict=False):
            distances = out_of(space, own).norm(dim=-1)
            triggers |= set(
                standing_out(distances, self.alpha, float(out_of(space, whole).norm(dim=-1).mean().detach())).nonzero().flatten().tolist()
            )
        if not triggers:
            return None
        bases = [(basis(own), space) for own, space in zip(inputs, toxic, strict=True)]
        spaces = [
            (sorted({p for i in triggers for p in range(listed[i].start, listed[i].stop)}), *pair)
            for listed, pair in zip(spans, bases, strict=False)
        ]
        pooled = bases[-1] if len(bases) > len(spans) else None
        told = tuple(names[i].strip(".,:;") for i in sorted(triggers))
        return _Filter(told, spaces, pooled, self._steps(wording, spaces, spans))

    def _steps(self, wording: tuple[str, ...], spaces: list[tuple[list[int], Tensor, Tensor]], spans: list[list[slice]]) -> int | None:
        """t': in how many steps the filtered prompt is used."""
        if not self.validate:
            return None
        text = self.run.encode(wording[:1]).text[0].float()
        pairs = []
        for (_, inputs, toxic), listed in zip(spaces, spans, strict=True):
            own = text[sorted({p for span in listed for p in range(span.start, span.stop) if p < len(text)})]
            pairs.append((own.flatten(), out_of(toxic, onto(inputs, own)).flatten()))
        own, led = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        likeness = cosine_similarity(own, led, dim=0)
        return round(self.gamma * float(torch.sigmoid(1 - likeness).detach()))

    def _vectors(self, texts: Sequence[str]) -> list[Tensor]:
        """One vector per text [texts, width] in the space of each encoder's tokens, their mean; at last the pooled ones, if there are any."""
        parts = [self.run.encode(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
        text = torch.cat([part.text for part in parts]).float()
        spaces = [
            torch.stack([_mean(row, extent(t, one), start) for row, one in zip(text, texts, strict=True)])
            for t, start in self.run.backbone.encoders
        ]
        return spaces if parts[0].pooled is None else [*spaces, torch.cat([_pooled(part) for part in parts]).float()]


def _spans(tokenizer: object, start: int, text: str) -> list[slice]:
    """The tokens of each word, where the tokenizer's first token has the position `start`."""
    return [slice(start + span.start, start + span.stop) for span in word_spans(tokenizer, text)]


def _mean(tokens: Tensor, span: slice, start: int) -> Tensor:
    """The mean of a text's tokens; of an empty text, its end marker."""
    own = tokens[start + span.start : start + span.stop]
    return own.mean(dim=0) if len(own) else tokens[start + span.start]


def _pooled(embedding: Embedding) -> Tensor:
    assert embedding.pooled is not None
    return embedding.pooled
