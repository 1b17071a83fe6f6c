"""The testbed's pipelines: plain diffusers pipelines with the weights that ship with the package."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file
from torch import nn

from ..errors import ArtefactError
from . import architectures
from .schedules import noise_schedule
from .tokenizer import build

Name = Literal["sd", "sd3", "flux", "kontext"]
NAMES: tuple[str, ...] = get_args(Name)


def settings(name: str) -> dict[str, Any]:
    """The call arguments with which a pipeline was made to work: size, steps, guidance."""
    common: dict[str, Any] = {"num_inference_steps": 20}
    if name in ("sd", "sd3"):
        return common | {"guidance_scale": 3.0, "height": 64, "width": 64}
    guided = common | {"guidance_scale": 1.0, "true_cfg_scale": 2.5, "negative_prompt": "", "height": 64, "width": 64}
    if name == "flux":
        return guided
    if name == "kontext":  # weaker guidance keeps more of the source
        return guided | {"true_cfg_scale": 1.5, "max_area": 64 * 64, "_auto_resize": False}
    raise _unknown(name)


def load(name: str, weights: Path | None = None) -> Any:
    """A testbed pipeline on the CPU in fp32, made from bundled weights without any network.

    `sd` is a StableDiffusionPipeline, `sd3` a StableDiffusion3Pipeline, `flux` a FluxPipeline, and `kontext` a FluxKontextPipeline with the same transformer. Call it
    with `**settings(name)`.

    Raises:
        ValueError: if there is no pipeline of that name.
        ArtefactError: if weights are missing or damaged.
    """
    if name not in NAMES:
        raise _unknown(name)
    vae = _filled(architectures.autoencoder(), "vae", weights)
    pipe: Any
    if name == "sd3":
        pipe = _sd3(vae, weights)
    elif name == "sd":
        clip = _filled(architectures.clip(), "clip", weights)
        pipe = StableDiffusionPipeline(
            vae=vae, text_encoder=clip, tokenizer=build("clip"), unet=_filled(architectures.unet(), "unet", weights),
            scheduler=noise_schedule(), safety_checker=cast(Any, None), feature_extractor=cast(Any, None), requires_safety_checker=False,
        )  # fmt: skip
    else:
        kind, clip = FluxPipeline if name == "flux" else FluxKontextPipeline, _filled(architectures.clip(), "clip", weights)
        pipe = kind(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae, text_encoder=clip, tokenizer=cast(Any, build("clip")),
            text_encoder_2=_filled(architectures.t5(), "t5", weights), tokenizer_2=cast(Any, build("t5")),
            transformer=_filled(architectures.flux(), "flux", weights),
        )  # fmt: skip
        pipe.default_sample_size = 16  # the size at which `pipe("a cat")` works; an attribute of each pipeline object
    pipe.register_to_config(_name_or_path=f"testbed/{name}")  # as `from_pretrained` does
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd3(vae: nn.Module, weights: Path | None) -> Any:
    """SD3's two CLIP encoders are one and the same here; of their joined tokens, the pipeline keeps T5's width, which is the first's."""
    clip = architectures.projecting_clip().eval().requires_grad_(False)
    _filled(clip.text_model, "clip", weights)
    tokenizer = cast(Any, build("clip"))
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=cast(Any, vae), transformer=_filled(architectures.sd3(), "sd3", weights),
        text_encoder=clip, tokenizer=tokenizer, text_encoder_2=clip, tokenizer_2=tokenizer,
        text_encoder_3=_filled(architectures.t5(), "t5", weights), tokenizer_3=cast(Any, build("t5")),
    )  # fmt: skip


def _unknown(name: str) -> ValueError:
    return ValueError(f"there is no testbed pipeline {name!r}; there are {', '.join(NAMES)}")


def weights_folder() -> Path:
    """Where the bundled weights lie."""
    return Path(str(resources.files(__package__).joinpath("weights")))


@cache
def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except Exception as error:  # safetensors raises its own and OS errors
        raise ArtefactError(f"{path} can't be read ({error}); reinstall the package, or run `safelight testbed train`") from error


def _filled(net: nn.Module, name: str, weights: Path | None) -> nn.Module:
    """A network with its stored weights, in evaluation mode. Weights are stored in half precision and used in fp32."""
    found = net.load_state_dict(_read((weights or weights_folder()) / f"{name}.safetensors"), strict=False)
    missing = [key for key in found.missing_keys if key != "encoder.embed_tokens.weight"]  # tied to T5's `shared.weight`
    if missing or found.unexpected_keys:
        raise ArtefactError(f"{name}.safetensors doesn't fit its network (first misfit: {(missing + found.unexpected_keys)[0]})")
    return net.eval().requires_grad_(False)
