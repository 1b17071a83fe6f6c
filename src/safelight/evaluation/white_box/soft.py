"""Prompts with a gradient: zeros are added to the embeddings of some tokens, and what the loss makes of them is read off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .words import Template, TextEncoder

NOWHERE = -1


class SoftTokens:
    """Zeros that are added to the input embeddings of prompts' attacked tokens, in every text encoder, wherever it meets them."""

    def __init__(self, encoders: Sequence[TextEncoder], templates: Sequence[Template], prompts: Sequence[str]) -> None:
        """`prompts` are the templates with words in them."""
        self.encoders = list(encoders)
        slots = max(template.slots for template in templates)
        device = self.encoders[0].table.device
        self.deltas = [torch.zeros(len(prompts), slots, encoder.table.shape[1], device=device, requires_grad=True) for encoder in encoders]
        """[batch, slots, width] for each encoder; templates with fewer slots leave the last ones unused."""
        self._ids = [encoder.ids(prompts) for encoder in encoders]
        rows = [[template.places(encoder) for template in templates] for encoder in encoders]
        self._places = [torch.tensor([[*row, *[NOWHERE] * (slots - len(row))] for row in own]) for own in rows]

    @contextmanager
    def added(self) -> Iterator[None]:
        """While it lasts, text encoders get the embeddings with what is added."""
        with ExitStack() as stack:
            for index, encoder in enumerate(self.encoders):
                for module in encoder.net.modules():
                    if isinstance(module, nn.Embedding) and module.weight is encoder.table:
                        stack.callback(module.register_forward_hook(self._hook(index)).remove)
            yield

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows, owners = self._met(arguments[0].detach().cpu(), self._ids[index], self._places[index])
            if not rows:
                return output
            places, delta = self._places[index][owners], self.deltas[index]
            inside = (places != NOWHERE) & (places < output.shape[1])
            added = torch.zeros_like(output)
            lines = torch.tensor(rows)[:, None].expand_as(places)
            added[lines[inside], places[inside]] = delta[owners][inside].to(output)
            return output + added

        return add

    @staticmethod
    def _met(ids: Tensor, known: Tensor, places: Tensor) -> tuple[list[int], list[int]]:
        """The rows that are one of the prompts as far as its last attacked token, and whose: guards also encode longer versions."""
        length = min(ids.shape[-1], known.shape[1])
        same = (ids.view(-1, ids.shape[-1])[:, None, :length] == known[None, :, :length]).int().cumprod(dim=-1).sum(dim=-1)
        owner = same.argmax(dim=1)  # of equal prompts the first one, which then has the gradient of all
        best = same.gather(1, owner[:, None])[:, 0]
        met = best > places.amax(dim=1).clamp(max=length - 1)[owner]
        return met.nonzero()[:, 0].tolist(), owner[met].tolist()

    def first_of_equals(self) -> list[int]:
        """For each prompt, the first one that equals it: where its gradient is."""
        seen: dict[bytes, int] = {}
        rows = torch.cat(self._ids, dim=1).numpy()
        return [seen.setdefault(row.tobytes(), index) for index, row in enumerate(rows)]
