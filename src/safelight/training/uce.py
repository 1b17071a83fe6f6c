"""Weight editing for comparison: a U-Net that has unlearned concepts in closed form."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backbones as _known  # noqa: F401  (makes the backbones known)
from ..backbone import Backbone
from ..errors import ArtefactError, UnsupportedPipeline
from ..files import read_tensors, write_tensors
from ..tokens import extent

FORMAT = "safelight-edit/1"
PROJECTIONS = ("attn2.to_k", "attn2.to_v")
"""Where a U-Net's image tokens read the text."""


@dataclass(frozen=True)
class ConceptEdit:
    """Changed projections of a denoiser, and what they were changed for."""

    weights: Mapping[str, Tensor] = field(repr=False)
    """Path in the denoiser -> its new weight [out, in]."""
    edits: Mapping[str, str]
    """Concept -> what it was replaced by."""
    preserve: tuple[str, ...] = ()

    def apply(self, pipe: Any) -> Any:
        """A pipeline like `pipe` with an edited copy of its denoiser and a scheduler of its own; all else is shared, and `pipe` stays as it is.

        Raises:
            ArtefactError: if the projections are those of another model.
        """
        backbone = Backbone.of(pipe)
        module = copy.deepcopy(backbone.module)
        known = projections(module)
        if set(known) != set(self.weights) or any(known[name].weight.shape != weight.shape for name, weight in self.weights.items()):
            raise ArtefactError(
                "this edit was made for another model: its projections don't fit; make one for this model with `edit_concepts`"
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                known[name].weight.copy_(weight)
        return _with_denoiser(pipe, backbone.denoiser, module)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically."""
        facts = {"edits": dict(self.edits), "preserve": list(self.preserve)}
        write_tensors(path, FORMAT, self.weights, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> ConceptEdit:
        """Reads an edit.

        Raises:
            ArtefactError: if the file is missing, damaged, or holds something else.
        """
        metadata, weights = read_tensors(path, "an edit", FORMAT, "make one with `edit_concepts`")
        facts = metadata.parsed("facts")
        facts.only(("edits", "preserve"))
        edits = facts.mapping("edits")
        if not edits or not weights or not all(isinstance(text, str) for text in edits.values()):
            raise facts.error("edits nothing, or to something that is no text")
        metadata.settle()
        return cls(weights, edits, facts.texts("preserve", some=False))


def edit_concepts(pipe: Any, edits: Mapping[str, str], preserve: Sequence[str] = (), **settings: Any) -> Any:
    """A pipeline whose denoiser takes some concepts for others; `pipe` itself is not changed.

    Unified Concept Editing (Gandikota et al., 2023, https://arxiv.org/abs/2308.14761). `settings` are those of `solve`.
    """
    return solve(pipe, edits, preserve, **settings).apply(pipe)


@torch.no_grad()
def solve(
    pipe: Any, edits: Mapping[str, str], preserve: Sequence[str] = (), *,
    closeness: float = 0.5, preserved: float = 1.0, templates: Sequence[str] = ("{}",),
) -> ConceptEdit:  # fmt: skip
    """The projections W that minimise Σ ‖W cᵢ - W_old gᵢ‖² + `preserved` Σ ‖W cⱼ - W_old cⱼ‖² + `closeness` ‖W - W_old‖², in closed form.

    Args:
        pipe: a pipeline with a U-Net.
        edits: concept -> what it is to become; "" for nothing in particular.
        preserve: concepts that are to stay.
        closeness: λ.
        preserved: the weight of what is to stay.
        templates: sentences with `{}` for the concept: a text encoder makes different things of a word in different company.

    Raises:
        UnsupportedPipeline: if the denoiser doesn't read text by cross-attention.
        ValueError: if there is nothing to edit, or a concept is empty or both edited and preserved.
    """
    if not edits or not all(concept.strip() for concept in [*edits, *preserve]):
        raise ValueError("give at least one concept to edit, and no empty ones: {'knife': 'spoon'}")
    if both := set(edits) & set(preserve):
        raise ValueError(f"{min(both)!r} is to be edited and preserved; choose one")
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"templates={tuple(templates)!r}: each needs the place of the concept, {{}}, once")
    if closeness <= 0 or preserved < 0:
        raise ValueError(f"closeness={closeness} must be above 0, and preserved={preserved} not below")
    backbone = Backbone.of(pipe)
    known = projections(backbone.module)
    concepts, goals = _pairs(backbone, [(one, other) for one, other in edits.items()], templates)
    kept, _ = _pairs(backbone, [(one, one) for one in preserve], templates)
    width = concepts.shape[1]
    own = concepts.T @ concepts + preserved * (kept.T @ kept) + closeness * torch.eye(width, dtype=torch.float64)
    wanted = goals.T @ concepts + preserved * (kept.T @ kept) + closeness * torch.eye(width, dtype=torch.float64)
    change = torch.linalg.solve(own, wanted.T).T  # [in, in]: W = W_old · wanted · own⁻¹
    weights = {name: (module.weight.double().cpu() @ change).to(module.weight.dtype) for name, module in known.items()}
    return ConceptEdit(weights, dict(edits), tuple(preserve))


def projections(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """Path -> key or value projection of the text.

    Raises:
        UnsupportedPipeline: if there are none, or they are no plain linear maps.
    """
    found = {name: module for name, module in denoiser.named_modules() if name.endswith(PROJECTIONS)}
    if not found:
        raise UnsupportedPipeline(
            f"{type(denoiser).__name__} has no cross-attention to edit: in MM-DiTs text and image share one attention; use a U-Net's pipeline"
        )
    if wrapped := [name for name, module in found.items() if not isinstance(module, nn.Linear)]:
        raise UnsupportedPipeline(f"{wrapped[0]} is no plain linear map (an adapter?); fuse or unload adapters before editing")
    return found  # type: ignore[return-value]


def _pairs(backbone: Backbone, pairs: Sequence[tuple[str, str]], templates: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of concepts and of what they become, token beside token from the concept's last one on, [tokens, width] each."""
    (tokenizer, _), *_ = backbone.encoders
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for template in templates:
        before = template.split("{}")[0]
        texts = [template.format(word) for pair in pairs for word in pair]
        tokens = backbone.embed(texts, backbone.pipe.encode_prompt).text.double().cpu() if texts else torch.empty(0)
        starts = [_last(tokenizer, before + word) for pair in pairs for word in pair]
        for index in range(0, len(texts), 2):
            length = tokens.shape[1] - max(starts[index : index + 2])
            for side in range(2):
                found[side].append(tokens[index + side, starts[index + side] :][:length])
    empty = torch.zeros(0, next(iter(projections(backbone.module).values())).in_features, dtype=torch.float64)
    return torch.cat([empty, *found[0]]), torch.cat([empty, *found[1]])


def _last(tokenizer: Any, text: str) -> int:
    """The position of a text's last token; of an empty text, that of the end marker."""
    span = extent(tokenizer, text)
    return max(span.start, span.stop - 1)


def _with_denoiser(pipe: Any, name: str, module: nn.Module) -> Any:
    """A pipeline of the same class with another denoiser, and a scheduler of its own, as schedulers remember the generation they are in."""
    parts = dict(pipe.components)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made = type(pipe)(**parts | {name: module.eval().requires_grad_(False), "scheduler": scheduler}, **_flags(pipe))
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def _flags(pipe: Any) -> dict[str, Any]:
    """Arguments of the constructor that are no components."""
    return {"requires_safety_checker": pipe.config.requires_safety_checker} if "requires_safety_checker" in pipe.config else {}
