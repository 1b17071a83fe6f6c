"""Scenes and edits, encoded once: what the generators are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..captions import Edit, edit_split, sample_caption, sample_edit
from ..scenes import Scene, render, sample_scene
from .text import tokens
from .vae import to_tensor


class Latents:
    """`scenes[i]` has latents `images[i]` [4, 16, 16]; `edits[i]` has `sources[i]` and `targets[i]`."""

    def __init__(self, vae: AutoencoderKL, out: Path, scenes: int, edits: int, seed: int = 3) -> None:
        random = Random(seed)
        self.scenes = [sample_scene(random) for _ in range(scenes)]
        self.edits = list(_training_edits(random, edits))
        file = out / "latents.safetensors"
        if not file.is_file():
            out.mkdir(parents=True, exist_ok=True)
            groups = {
                "images": self.scenes,
                "sources": [edit.source for edit in self.edits],
                "targets": [edit.target for edit in self.edits],
            }
            save_file({name: _encode(vae, group) for name, group in groups.items() if group}, file)
        stored = {name: tensor.float() for name, tensor in load_file(file).items()}
        self.images = stored["images"]
        self.sources, self.targets = stored["sources"], stored["targets"]


def _training_edits(random: Random, count: int) -> Iterator[Edit]:
    while count:
        edit = sample_edit(random)
        if edit_split(edit) == "train":
            yield edit
            count -= 1


@torch.no_grad()
def _encode(vae: AutoencoderKL, scenes: list[Scene], batch: int = 64) -> Tensor:
    parts = [
        vae.encode(to_tensor([render(scene) for scene in scenes[i : i + batch]]).to(vae.device)).latent_dist.mean.half()
        for i in range(0, len(scenes), batch)
    ]
    return torch.cat(parts).cpu().contiguous()


class Prompts(nn.Module):
    """The frozen text encoders: prompts -> (T5 tokens, CLIP tokens of a layer, CLIP pooled); layer -1 is the normalised last one."""

    def __init__(self, t5: nn.Module, clip: nn.Module) -> None:
        super().__init__()
        self.t5, self.clip = t5.eval(), clip.eval()

    @torch.no_grad()
    def forward(self, texts: list[str], device: Any, layer: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        clip = self.clip(input_ids=tokens("clip", texts).to(device), output_hidden_states=True)
        words = clip.last_hidden_state if layer == -1 else clip.hidden_states[layer]
        return self.t5(input_ids=tokens("t5", texts).to(device)).last_hidden_state, words, clip.pooler_output


def choose(generator: torch.Generator, total: int, batch: int) -> Tensor:
    """Random indices, [batch]."""
    return torch.randint(total, (batch,), generator=generator)


def captions(generator: torch.Generator, scenes: list[Scene], dropout: float) -> list[str]:
    """A wording of each scene; empty with probability `dropout`, for guidance."""
    random = Random(generator.initial_seed())
    return [_dropped(random, sample_caption(random, scene), dropout) for scene in scenes]


def instructions(generator: torch.Generator, edits: list[Edit], dropout: float) -> list[str]:
    """The instructions of edits; empty with probability `dropout`."""
    random = Random(generator.initial_seed())
    return [_dropped(random, edit.instruction, dropout) for edit in edits]


def _dropped(random: Random, text: str, dropout: float) -> str:
    return "" if random.random() < dropout else text


def noise_like(generator: torch.Generator, x: Tensor) -> Tensor:
    """Standard normal noise from a CPU generator, on the tensor's device."""
    return torch.randn(x.shape, generator=generator).to(x)
