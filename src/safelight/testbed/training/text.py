"""Trains the testbed's text encoders to parse captions and instructions.

Real text encoders arrive pre-trained too. Here the task is the language itself: every token says which object, background,
style or operation it belongs to and at which place, and CLIP's pooled vector says what the whole scene holds.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...fitting import Loss, Recipe
from .. import architectures
from ..captions import OPERATIONS, Edit, sample_caption, sample_edit
from ..scenes import Scene, sample_scene
from ..tokenizer import build
from ..world import BACKGROUNDS, OBJECTS, STYLES, SYNONYMS

RECIPE = Recipe(lr=2e-3, warmup=0.05, decay=0.6, ema=0.99, seed=2, bf16=False)

CONTENTS: tuple[str, ...] = (*OBJECTS, *BACKGROUNDS, *STYLES)
PLACES = ("left", "right", "alone", "new", "old", "context")
MEANING = {word: name for name in OBJECTS for word in (name, *SYNONYMS[name])} | {word: word for word in BACKGROUNDS}


class Parser(nn.Module):
    """Both text encoders, with the linear heads that are thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.t5, self.clip = architectures.t5(), architectures.clip()
        width = architectures.TEXT_WIDTH
        self.token = nn.ModuleDict({name: nn.Linear(width, len(CONTENTS) + 1 + len(PLACES)) for name in ("t5", "clip")})
        self.pooled = nn.Linear(width, 2 * len(OBJECTS) + len(BACKGROUNDS) + len(STYLES) + len(OPERATIONS))

    def forward(self, t5_ids: Tensor, clip_ids: Tensor) -> dict[str, Tensor]:
        clip = self.clip(input_ids=clip_ids)
        return {
            "t5": self.token["t5"](self.t5(input_ids=t5_ids).last_hidden_state),
            "clip": self.token["clip"](clip.last_hidden_state),
            "pooled": self.pooled(clip.pooler_output),
        }


def tokens(kind: str, texts: list[str]) -> Tensor:
    """Token ids [batch, 16]."""
    return build(kind)(texts, padding="max_length", return_tensors="pt").input_ids  # type: ignore[arg-type]


def token_targets(text: str, places: dict[str, str]) -> list[tuple[int, int]]:
    """For each word of a prompt: what it names (0: nothing), and the place of that thing."""
    targets = []
    for word in text.lower().replace(",", " ").replace(":", " ").split():
        name = MEANING.get(word) or next((style for style in STYLES if word in style.split()), None)
        index = 0 if name is None else 1 + CONTENTS.index(name)
        targets.append((index, PLACES.index(places.get(name or "", "context"))))
    return targets


def scene_places(scene: Scene) -> dict[str, str]:
    """Object -> place, as a caption implies it."""
    return dict(zip(scene.names, ("left", "right") if len(scene.names) == 2 else ("alone",), strict=True))


def pooled_target(names: dict[str, str], background: str | None, style: str | None, operation: str | None) -> Tensor:
    """What CLIP's pooled vector should tell, multi-hot: first object, second object, background, style, operation."""
    objects = list(OBJECTS)
    target = torch.zeros(2 * len(objects) + len(BACKGROUNDS) + len(STYLES) + len(OPERATIONS))
    for name, place in names.items():
        target[objects.index(name) + (len(objects) if place in ("right", "old") else 0)] = 1
    tail = [*BACKGROUNDS, *STYLES, *OPERATIONS]
    for word in (background, style, operation):
        if word is not None:
            target[2 * len(objects) + tail.index(word)] = 1
    return target


def edit_target(edit: Edit) -> tuple[dict[str, str], str | None]:
    """Object -> role in an instruction, and the background it names."""
    roles = {name: "new" for name in edit.target.names if name not in edit.source.names}
    roles |= {name: "old" for name in edit.source.names if name not in edit.target.names}
    return roles, edit.target.background if edit.operation == "background" else None


def sample_text(random: Random) -> tuple[str, dict[str, str], Tensor]:
    """A prompt, the places of what it names, and the pooled target."""
    if random.random() < 0.3:
        edit = sample_edit(random)
        roles, background = edit_target(edit)
        return edit.instruction, roles, pooled_target(roles, background, None, edit.operation)
    scene = sample_scene(random)
    places = scene_places(scene)
    return sample_caption(random, scene), places, pooled_target(places, scene.background, scene.style, None)


def loss_of(parser: Parser, batch: int = 64) -> Loss:
    """Cross-entropies of the token heads and of the pooled head."""

    def loss(generator: torch.Generator) -> Tensor:
        random = Random(generator.initial_seed())
        texts, places, pooled = zip(*(sample_text(random) for _ in range(batch)), strict=True)
        output = parser(tokens("t5", list(texts)), tokens("clip", list(texts)))
        total = F.binary_cross_entropy_with_logits(output["pooled"], torch.stack(pooled)) * 20
        for kind, offset in (("t5", 0), ("clip", 1)):
            for row, (text, where) in enumerate(zip(texts, places, strict=True)):
                content, place = torch.tensor(token_targets(text, where)).unbind(1)
                logits = output[kind][row, offset : offset + len(content)]
                total = total + F.cross_entropy(logits[:, : -len(PLACES)], content) / batch
                total = total + F.cross_entropy(logits[:, -len(PLACES) :], place) / batch * (0.3 if offset else 1.0)
        return total

    return loss
