"""Stable Diffusion 1 and 2: a U-Net whose image tokens read the text by cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..backbone import Backbone
from ..site import Attention, Layout, Port

BLOCKS = {
    "down": "down_blocks.*.attentions.*.transformer_blocks.*",
    "middle": "mid_block.attentions.*.transformer_blocks.*",
    "up": "up_blocks.*.attentions.*.transformer_blocks.*",
}
PORTS = {
    "": Port("", "output", 0, ("image",)),
    ".self": Port("attn1.to_out.0", "input", 0, ("image",)),
    ".cross": Port("attn2.to_out.0", "input", 0, ("image",)),
}
ATTENTIONS = {".self": Attention("attn1", ("image",), ("image",)), ".cross": Attention("attn2", ("image",), ("text",))}


class UNet(Backbone):
    """Latents [batch, channels, height, width]; guidance in one batched call, unconditional rows first."""

    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    denoiser = "unet"
    latents = "sample"
    pooled = None
    encoded = ("text", "negative_text")
    blocks = BLOCKS
    ports = {f"{block}{part}:image": port for block in BLOCKS for part, port in PORTS.items()}
    attentions = {f"{block}{part}": attention for block in BLOCKS for part, attention in ATTENTIONS.items()}

    def layout(self, arguments: Mapping[str, Any]) -> Layout:
        height, width = arguments["sample"].shape[-2:]  # of the latents; inner blocks work on coarser grids
        return Layout(arguments["encoder_hidden_states"].shape[1], height * width, grid=(height, width))

    def pool(self, prompts: Sequence[str], encode_prompt: Callable[..., Any]) -> Tensor:
        return self.pool_first_encoder(prompts)
