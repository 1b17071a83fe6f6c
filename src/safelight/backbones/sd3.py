"""Stable Diffusion 3 and 3.5: joint blocks only; image tokens come before text tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..backbone import Backbone
from ..errors import UnsupportedPipeline
from ..site import Attention, Layout, Port


class SD3(Backbone):
    """Latents [batch, channels, height, width]; guidance in one batched call, unconditional rows first."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    denoiser = "transformer"
    encoded = ("text", "negative_text", "pooled", "negative_pooled")
    prompts = ("prompt", "prompt_2", "prompt_3")
    tokenizers = ("tokenizer", "tokenizer_3")
    calls = 2  # the second is skip-layer guidance's
    blocks = {"joint": "transformer_blocks.*"}
    ports = {
        "prompt:text": Port("context_embedder", "input", 0, ("text",)),
        "joint:text": Port("", "output", 0, ("text",)),  # the last block returns none, and its site is never hit
        "joint:image": Port("", "output", 1, ("image",)),
        "joint.attention:image": Port("attn.to_out.0", "input", 0, ("image",)),
    }
    attentions = {"joint.attention": Attention("attn", ("image", "text"), ("image", "text"))}

    def cond(self, rows: int, turn: int) -> slice:
        return slice(0, rows) if turn else super().cond(rows, turn)  # skip-layer guidance asks for the prompt's rows again

    def guide(self, predictions: Sequence[Tensor], scale: float) -> Tensor:
        if len(predictions) > 1:
            raise UnsupportedPipeline("an extra branch can't repeat skip-layer guidance; leave it off, or use coupling='coupled'")
        return super().guide(predictions, scale)

    def layout(self, arguments: Mapping[str, Any]) -> Layout:
        patch = self.pipe.transformer.config.patch_size
        height, width = (size // patch for size in arguments["hidden_states"].shape[-2:])
        return Layout(arguments["encoder_hidden_states"].shape[1], height * width, grid=(height, width))
