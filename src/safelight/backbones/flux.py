"""FLUX.1 and FLUX.1 Kontext: joint blocks, then single blocks; text tokens come before image tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backbone import Backbone
from ..flow import Call
from ..site import Attention, Layout, Port, Stream

IMAGE: tuple[Stream, ...] = ("image", "reference")
ALL: tuple[Stream, ...] = ("text", "image", "reference")


class Flux(Backbone):
    """Packed latents [batch, tokens, 64]; guidance is distilled, or done in a second call."""

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline")
    denoiser = "transformer"
    rows = ("guidance",)
    timestep_scale = 1000
    separate = True
    calls = 2
    encoded = ("text", "pooled", "ids")
    prompts = ("prompt", "prompt_2")
    tokenizers = ("tokenizer_2",)
    blocks = {"joint": "transformer_blocks.*", "single": "single_transformer_blocks.*"}
    ports = {
        "prompt:text": Port("context_embedder", "input", 0, ("text",)),
        "joint:text": Port("", "output", 0, ("text",)),
        "joint:image": Port("", "output", 1, IMAGE),
        "joint.attention:text": Port("attn.to_add_out", "input", 0, ("text",)),
        "joint.attention:image": Port("attn.to_out.0", "input", 0, IMAGE),
        "single:text": Port("", "output", 0, ("text",)),
        "single:image": Port("", "output", 1, IMAGE),
        "single.attention:image": Port("attn", "output", 0, ALL),
    }
    attentions = {"joint.attention": Attention("attn", ALL, ALL), "single.attention": Attention("attn", ALL, ALL)}

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._latest: tuple[Tensor, Layout] | None = None

    def layout(self, arguments: Mapping[str, Any]) -> Layout:
        ids, text = arguments["img_ids"], arguments["encoder_hidden_states"].shape[1]
        if self._latest is None or self._latest[0] is not ids:  # read once: each look at the positions waits for the device
            # [tokens, 3]: (0, y, x) for the image, (1, y, x) for Kontext's reference
            image, reference = ids[ids[:, 0] == 0], ids[ids[:, 0] != 0]
            self._latest = ids, Layout(text, len(image), len(reference), _grid(image), _grid(reference))
        return replace(self._latest[1], text=text)

    def cond(self, rows: int, turn: int) -> slice:
        return slice(0, rows) if turn == 0 else slice(0, 0)  # true guidance asks for the negative prompt second

    def pool(self, prompts: Sequence[str], encode_prompt: Callable[..., Any]) -> Tensor:
        return self.pool_first_encoder(prompts)  # CLIP's; T5 would cost more than the rest of the detector

    def guide(self, predictions: Sequence[Tensor], scale: float) -> Tensor:
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = predictions
        return uncond + scale * (cond - uncond)

    def scale(self, predictions: Sequence[Tensor], guided: Tensor) -> float:
        """`true_cfg_scale` is a local variable of the pipeline; solve uncond + s (cond - uncond) = guided for it."""
        if len(predictions) == 1:
            return 1.0
        cond, uncond = (p.double() for p in predictions)
        difference = cond - uncond
        return round(float(((guided.double() - uncond) * difference).sum() / difference.square().sum().clamp_min(1e-12)), 4)


class Kontext(Flux):
    """The tokens of a reference image follow those of the image."""

    pipelines = ("FluxKontextPipeline",)
    ports = Flux.ports | {
        "joint.attention:reference": Port("attn.to_out.0", "input", 0, IMAGE),
        "single.attention:reference": Port("attn", "output", 0, ALL),
    }

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], turn: int, samples: int) -> Call:
        call = super().read(args, kwargs, turn, samples)
        image, reference = call.latents.split([call.layout.image, call.layout.reference], dim=1)
        return replace(call, latents=image, reference=reference)

    def write(self, call: Call) -> dict[str, Any]:
        assert call.reference is not None
        return super().write(replace(call, latents=torch.cat([call.latents, call.reference], dim=1)))

    def noise(self, output: Tensor, call: Call) -> Tensor:
        return output[:, : call.layout.image]


def _grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens with these positions, [tokens, 3]."""
    if len(ids) == 0:
        return 0, 0
    height, width = (ids[:, 1:].amax(dim=0) - ids[:, 1:].amin(dim=0) + 1).tolist()
    return int(height), int(width)
