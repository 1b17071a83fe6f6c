"""The shapes of the testbed's networks: real diffusers and transformers classes, tiny."""

from __future__ import annotations

from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from .tokenizer import EOS, LENGTH, PAD, vocabulary

TEXT_WIDTH = 128
LATENT_CHANNELS = 4


def autoencoder() -> AutoencoderKL:
    """f4, 4 latent channels; the 1x1 convolutions hold the normalisation of the latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def t5() -> T5EncoderModel:
    """The token-level text encoder of the MM-DiTs."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary()), d_model=TEXT_WIDTH, d_kv=32, num_heads=4, d_ff=256, num_layers=2,
            dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        )
    )  # fmt: skip


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary()), hidden_size=TEXT_WIDTH, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=TEXT_WIDTH,
        pad_token_id=PAD, bos_token_id=2, eos_token_id=EOS,
    )  # fmt: skip


def clip() -> CLIPTextModel:
    """The text encoder of the U-Net, and the pooled one of FLUX."""
    return CLIPTextModel(_clip_config())


def projecting_clip() -> CLIPTextModelWithProjection:
    """The same text encoder in the class that SD3 wants; its projection is the identity, and isn't stored."""
    model = CLIPTextModelWithProjection(_clip_config())
    nn.init.eye_(model.text_projection.weight)
    return model


def flux() -> FluxTransformer2DModel:
    """2 double and 4 single blocks over 64 image tokens (and 64 of a reference image)."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=4, attention_head_dim=32,
        num_attention_heads=6, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def sd3() -> SD3Transformer2DModel:
    """4 joint blocks over 64 image tokens; the queries and keys are normalised as in SD 3.5."""
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=4,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    """Attention at 16, 8 and 4 latent pixels."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(64, 96, 128),
        layers_per_block=1, norm_num_groups=16, cross_attention_dim=TEXT_WIDTH, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
