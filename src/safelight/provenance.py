"""Where embeddings come from: each row that the denoiser gets must have been encoded, and judged, in this generation."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import SafetyBypassed

UNKNOWN = (
    "the denoiser got an embedding that was not encoded and judged in this generation (did a callback or a subclass change `prompt_embeds`?); "
    "the images are withheld. Pass prompts to the pipeline, or encode them with its `encode_prompt` while it generates"
)


class Known:
    """An embedding that was encoded in this generation, as it was then: whoever changes the tensor later changes no copy of it."""

    def __init__(self, text: Tensor, pooled: Tensor | None = None) -> None:
        """`text` [rows, tokens, width], `pooled` [rows, width]."""
        self.given = text
        self._text, self._pooled = text.detach().clone(), None if pooled is None else pooled.detach().clone()

    def has_text(self, text: Tensor) -> Tensor:
        """Which rows are this embedding's, [rows]; computed on the device, and not waited for."""
        return _same_rows(text, self._text)

    def has_pooled(self, pooled: Tensor) -> Tensor:
        """Which rows are this embedding's pooled ones, [rows]; those of an embedding that has none are anybody's."""
        return torch.ones(len(pooled), dtype=torch.bool, device=pooled.device) if self._pooled is None else _same_rows(pooled, self._pooled)


def _same_rows(rows: Tensor, known: Tensor) -> Tensor:
    if rows.shape != known.shape:
        return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    return (rows.detach() == known.to(rows)).flatten(1).all(dim=1)


@dataclass(frozen=True)
class _Seen:
    """A tensor that was looked at: unless it was changed since, nobody need look again."""

    text: Tensor
    pooled: Tensor | None
    versions: tuple[int | None, int | None]
    prompt: slice

    @classmethod
    def of(cls, text: Tensor, pooled: Tensor | None, prompt: slice) -> _Seen:
        return cls(text, pooled, (_version(text), _version(pooled)), prompt)

    def is_still(self, text: Tensor, pooled: Tensor | None, prompt: slice) -> bool:
        """Whether these are the same tensors, unchanged, in the same role; where tensors don't count changes, it can't tell and says no."""
        same = self.text is text and self.pooled is pooled and self.prompt == prompt
        return same and self.versions[0] is not None and self.versions == (_version(text), _version(pooled))


@dataclass
class Provenance:
    """The embeddings of one generation, and the proof that the denoiser got no others."""

    prompts: list[Known] = field(default_factory=list)
    negatives: list[Known] = field(default_factory=list)
    _seen: list[_Seen] = field(default_factory=list)
    """The latest tensors: the prompt's and the negative one's, where each has a call of its own."""
    _known: Tensor | None = None
    """Whether all rows so far were known, where that is not yet read from the device."""

    def is_prompt(self, text: Tensor, pooled: Tensor | None) -> bool:
        """Whether a call follows the user's prompt, where the negative prompt has a call of its own.

        It goes by identity, and looks at the numbers only of a tensor that it doesn't know.

        Raises:
            SafetyBypassed: if the call follows neither.
        """
        whole = slice(0, len(text))
        if any(text is one.given for one in self.prompts) or any(seen.is_still(text, pooled, whole) for seen in self._seen):
            return True
        if any(text is one.given for one in self.negatives) or any(seen.is_still(text, pooled, slice(0, 0)) for seen in self._seen):
            return False
        if bool(_rows_of(self.prompts, text, pooled)):
            return True
        if bool(_rows_of(self.negatives, text, pooled)):
            return False
        raise SafetyBypassed(UNKNOWN)

    def check(self, text: Tensor, pooled: Tensor | None, prompt: slice) -> None:
        """Makes sure that the rows in `prompt` are the prompts', and all others the negative prompts'.

        On a CPU it raises at once; elsewhere `settle` does, so that no step waits for the device.

        Raises:
            SafetyBypassed: if a row is of unknown origin.
        """
        if any(seen.is_still(text, pooled, prompt) for seen in self._seen):
            return
        self._seen = [*self._seen[-1:], _Seen.of(text, pooled, prompt)]
        empty = prompt.start == prompt.stop
        for known, rows in ((self.prompts, prompt), (self.negatives, slice(0, len(text) if empty else prompt.start))):
            if rows.start != rows.stop:
                found = _rows_of(known, text[rows], None if pooled is None else pooled[rows])
                self._known = found if self._known is None else self._known & found
        if text.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Raises SafetyBypassed if any row was of unknown origin."""
        if self._known is not None and not bool(self._known):
            raise SafetyBypassed(UNKNOWN)


def _rows_of(known: list[Known], text: Tensor, pooled: Tensor | None) -> Tensor:
    """Whether every row is one of the known ones for its place, a scalar on the device.

    A text may stand with the pooled text of another one, if both are known: a schedule may change one of the two.
    """
    none = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    found = functools.reduce(operator.or_, (one.has_text(text) for one in known), none)
    if pooled is not None:
        found = found & functools.reduce(operator.or_, (one.has_pooled(pooled) for one in known), none)
    return found.all()


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was changed in place; tensors of inference mode don't tell."""
    return None if tensor is None or tensor.is_inference() else tensor._version
