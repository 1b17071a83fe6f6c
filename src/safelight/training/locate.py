"""Where a concept is in generated images: by a judge's boxes, by masks that somebody drew, or by the model's own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..backbone import Backbone
from ..errors import ArtefactError, UnsupportedPipeline
from ..flow import Heads
from ..masks import boxed, clean
from ..method import Method
from ..site import Site
from .examples import Example

Pictures = Sequence[NDArray[np.uint8]]


class Locator(Protocol):
    """Finds each example's concept in its picture."""

    def methods(self) -> Sequence[Method]:
        """What has to be attached while the pictures are made."""
        ...

    def __call__(self, pictures: Pictures, examples: Sequence[Example], grid: tuple[int, int]) -> list[Tensor | None]:
        """A mask [height, width] for each picture; None: not there, or benign."""
        ...


@dataclass(frozen=True)
class Boxes:
    """By the boxes of a judge such as the testbed's template matcher."""

    judge: Any

    def methods(self) -> Sequence[Method]:
        """Nothing."""
        return ()

    def __call__(self, pictures: Pictures, examples: Sequence[Example], grid: tuple[int, int]) -> list[Tensor | None]:
        """Looks at the pictures of unsafe examples."""
        wanted = [i for i, example in enumerate(examples) if example.concept]
        sights = dict(zip(wanted, self.judge.look([pictures[i] for i in wanted]), strict=True))
        return [self._mask(sights[i], pictures[i], e.concept, grid) if e.concept else None for i, e in enumerate(examples)]

    @staticmethod
    def _mask(sight: Any, picture: NDArray[np.uint8], concept: str, grid: tuple[int, int]) -> Tensor | None:
        if concept not in (sight.boxes or {}):
            return None
        height, width = picture.shape[:2]
        left, top, wide, high = sight.boxes[concept]
        return boxed(torch.tensor([[left / width, top / height, (left + wide) / width, (top + high) / height]]), grid)[0]


@dataclass(frozen=True)
class Drawn:
    """By the masks that came with the examples."""

    def methods(self) -> Sequence[Method]:
        """Nothing."""
        return ()

    def __call__(self, pictures: Pictures, examples: Sequence[Example], grid: tuple[int, int]) -> list[Tensor | None]:
        """Reads the masks.

        Raises:
            ArtefactError: if one is missing, or empty.
        """
        return [self._read(example, grid) if example.concept else None for example in examples]

    @staticmethod
    def _read(example: Example, grid: tuple[int, int]) -> Tensor:
        if example.mask is None:
            raise ArtefactError(
                f"there is no mask for {example.prompt!r}; give one in the column `mask`, or use masks from a judge or attention"
            )
        drawn = Image.open(example.mask).convert("L").resize(grid[::-1], Image.Resampling.BOX)
        mask = torch.from_numpy(np.asarray(drawn, dtype=np.float32)) > 127
        if not bool(mask.any()):
            raise ArtefactError(f"{example.mask} is empty at {grid[0]} x {grid[1]} tokens; paint the concept white")
        return mask


@dataclass(kw_only=True, eq=False)
class TextMass(Method):
    """Keeps how much attention each image token pays to each text token; the images stay bit-identical.

    Text-to-image attention locates what a word stands for, as in UVR (Yang et al., 2026, https://arxiv.org/abs/2606.06875).
    """

    at: Sequence[str]
    """The attentions, e.g. `single.10.attention`."""
    steps: Sequence[int]
    """Which steps."""
    kept: list[Tensor] = field(default_factory=list)
    """[batch, image tokens, text tokens] for each site and step of the latest generation."""

    def begin(self) -> None:
        """Drops what was kept of the generation before."""
        self.kept.clear()

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """The attentions."""
        return self.at

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        """One more fused call, whose values are the identity on text tokens, reads the probabilities off without making the rest."""
        if self.run.index in self.steps:
            self.kept.append(text_mass(heads, attend).cpu())
        return attend(heads)


def text_mass(heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
    """Attention of image queries to text keys, mean over heads, [batch, image tokens, text tokens]: in slices as wide as a head."""
    query, width = heads.query[:, :, heads.queries["image"]], heads.value.shape[-1]
    text = range(*heads.keys["text"].indices(heads.key.shape[2]))
    parts = []
    for start in range(0, len(text), width):
        columns = text[start : start + width]
        value = torch.zeros_like(heads.value)
        value[:, :, torch.tensor(columns), torch.arange(len(columns))] = 1
        parts.append(attend(replace(heads, query=query, value=value)).mean(1)[..., : len(columns)])
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class SelfLocalisation:
    """By the attention of image tokens to the word that names the concept."""

    pipe: Any
    mass: TextMass

    def methods(self) -> Sequence[Method]:
        """What listens to the attention."""
        return (self.mass,)

    def __call__(self, pictures: Pictures, examples: Sequence[Example], grid: tuple[int, int]) -> list[Tensor | None]:
        """Thresholds each map half-way between its mean and its maximum.

        Raises:
            ValueError: if a prompt doesn't hold its concept's word.
        """
        mass = torch.stack(self.mass.kept).float().mean(0)
        return [self._mask(mass[i], example, grid) if example.concept and example.word else None for i, example in enumerate(examples)]

    def _mask(self, mass: Tensor, example: Example, grid: tuple[int, int]) -> Tensor:
        heat = mass[:, self._tokens(example)].mean(1).view(1, *grid)
        return clean(heat > (heat.mean() + heat.amax()) / 2, heat, count=1)[0]

    def _tokens(self, example: Example) -> list[int]:
        tokenizer = getattr(self.pipe, "tokenizer_3", None) or getattr(self.pipe, "tokenizer_2", None) or self.pipe.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedPipeline(
                "self-localisation needs a fast tokenizer, which knows where its tokens are in the text; use drawn masks"
            )
        start = example.prompt.lower().find(example.word.lower())
        if start < 0:
            raise ValueError(
                f"the prompt {example.prompt!r} doesn't hold the word {example.word!r}; give its own wording in the column `word`"
            )
        spans = tokenizer(example.prompt, return_offsets_mapping=True).offset_mapping
        before = self.pipe.tokenizer_max_length if getattr(self.pipe, "tokenizer_3", None) else 0  # SD3 puts CLIP's tokens before T5's
        return [before + i for i, (low, high) in enumerate(spans) if low < start + len(example.word) and high > start and high > low]
