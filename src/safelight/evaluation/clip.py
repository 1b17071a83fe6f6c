"""Embeddings of CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .judge import Picture
from .pictures import to_images
from .pretrained import HubNetwork

LARGE = "openai/clip-vit-large-patch14"


@dataclass(kw_only=True, eq=False)
class Clip(HubNetwork):
    """CLIP through transformers."""

    access: ClassVar[str] = f"The weights (MIT, 1.7 GB) are open: `hf download {LARGE}`."

    model: str = LARGE
    """The hub's name of a CLIP, or a local folder."""

    @property
    def who(self) -> str:
        """The metric, in messages."""
        return "the metric 'clip_score'"

    def architecture(self) -> Any:
        """The transformers class of the network."""
        from transformers import CLIPModel

        return CLIPModel


@torch.no_grad()
def embed_pictures(clip: HubNetwork, pictures: Sequence[Picture]) -> Tensor:
    """Embeddings of unit length, [pictures, width]."""
    rows = []
    for start in range(0, len(pictures), clip.batch):
        prepared = clip.processor(images=to_images(pictures[start : start + clip.batch]), return_tensors="pt")
        rows.append(clip.network.get_image_features(**clip.inputs(prepared)).pooler_output.float().cpu())
    return normalize(torch.cat(rows), dim=-1)


@torch.no_grad()
def embed_texts(clip: HubNetwork, texts: Sequence[str]) -> Tensor:
    """Embeddings of unit length, [texts, width]; what exceeds CLIP's context (77 tokens) is cut off."""
    rows = []
    for start in range(0, len(texts), clip.batch):
        limit = clip.network.config.text_config.max_position_embeddings
        part = list(texts[start : start + clip.batch])
        prepared = clip.processor(text=part, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        rows.append(clip.network.get_text_features(**clip.inputs(prepared)).pooler_output.float().cpu())
    return normalize(torch.cat(rows), dim=-1)
