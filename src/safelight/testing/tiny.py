"""Real diffusers pipelines of the smallest size: random weights, real text encoders, a tenth of a second per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ..testbed.tokenizer import EOS, LENGTH, PAD, build, vocabulary

CLIP_WIDTH, T5_WIDTH = 16, 32
LATENT_SIZE = 12  # as many image tokens as no text has: a table that confuses the two is found out


def tiny_pipeline(name: str, seed: int = 0) -> Any:
    """A diffusers pipeline with random weights that makes images of 24 pixels: `sd`, `sd3`, `flux` or `kontext`.

    It understands the words of the testbed (`safelight.testbed.world`). Use it with `sample`.

    Raises:
        ValueError: if there is no pipeline of that name.
    """
    if name not in _MAKERS:
        raise ValueError(f"there is no tiny pipeline {name!r}; there are {', '.join(_MAKERS)}")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    pipe = _MAKERS[name]()
    torch.random.set_rng_state(state)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: Any, prompts: str | Sequence[str] | None, *, seeds: Sequence[int] | None = None, guided: bool = True, steps: int = 3,
    **changes: Any,
) -> Tensor:  # fmt: skip
    """Images [batch, 3, height, width] in 0..1 of a pipeline, each from a seed of its own.

    `guided` asks for classifier-free guidance (for FLUX the true one, by a second call); `changes` go to the pipeline.
    """
    given = 1 if isinstance(prompts, str) or prompts is None else len(prompts)
    count = given * changes.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds or range(count))]
    arguments: dict[str, Any] = {
        "prompt": prompts,
        "num_inference_steps": steps,
        "generator": generators,
        "output_type": "pt",
    }
    name = type(pipe).__name__
    if name.startswith("Flux"):
        arguments |= {"true_cfg_scale": 2.0, "negative_prompt": [""] * given} if guided else {}
    else:
        arguments |= {"guidance_scale": 3.0 if guided else 1.0}
    if name == "FluxKontextPipeline":
        size = pipe.default_sample_size * pipe.vae_scale_factor
        picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(7))
        arguments |= {"image": picture, "max_area": size * size, "_auto_resize": False}
    return cast(Tensor, pipe(**arguments | changes).images)


def _autoencoder(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=2 * LATENT_SIZE, mid_block_add_attention=False, **settings,
    )  # fmt: skip


def _flow_autoencoder() -> AutoencoderKL:
    return _autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


def _clip(kind: type[Any]) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(vocabulary()), hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=CLIP_WIDTH, pad_token_id=PAD, bos_token_id=2, eos_token_id=EOS,
    )  # fmt: skip
    return kind(config)


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary()), d_model=T5_WIDTH, d_kv=16, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0,
            pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        )
    )  # fmt: skip


def _sd() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CLIP_WIDTH, attention_head_dim=4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=_autoencoder(), text_encoder=_clip(CLIPTextModel), tokenizer=cast(Any, build("clip")), unet=unet,
        scheduler=cast(Any, DDIMScheduler(clip_sample=False, steps_offset=1)), requires_safety_checker=False,
        safety_checker=cast(Any, None), feature_extractor=cast(Any, None),
    )  # fmt: skip


def _sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=T5_WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_flow_autoencoder(),
        text_encoder=_clip(CLIPTextModelWithProjection), tokenizer=cast(Any, build("clip")),
        text_encoder_2=_clip(CLIPTextModelWithProjection), tokenizer_2=cast(Any, build("clip")),
        text_encoder_3=_t5(), tokenizer_3=cast(Any, build("t5")),
    )  # fmt: skip


def _flux(kind: type[Any] = FluxPipeline) -> Any:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_flow_autoencoder(), text_encoder=_clip(CLIPTextModel),
        tokenizer=build("clip"), text_encoder_2=_t5(), tokenizer_2=build("t5"), transformer=transformer,
    )  # fmt: skip
    pipe.default_sample_size = LATENT_SIZE
    return pipe


_MAKERS: Mapping[str, Callable[[], Any]] = {
    "sd": _sd,
    "sd3": _sd3,
    "flux": _flux,
    "kontext": lambda: _flux(FluxKontextPipeline),
}
NAMES = tuple(_MAKERS)
