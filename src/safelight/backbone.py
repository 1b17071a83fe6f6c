"""What a method may know of a denoiser."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import UnsupportedPipeline
from .flow import Call, Embedding
from .site import Attention, Layout, Port, Site
from .tokens import padded_length

BACKBONES: dict[str, type[Backbone]] = {}


class Backbone:
    """The anatomy of one denoiser family: tables, a few names, and how its tokens are laid out."""

    pipelines: ClassVar[tuple[str, ...]]
    """The diffusers pipelines it knows."""
    denoiser: ClassVar[str]
    latents: ClassVar[str] = "hidden_states"
    text: ClassVar[str] = "encoder_hidden_states"
    pooled: ClassVar[str | None] = "pooled_projections"
    rows: ClassVar[tuple[str, ...]] = ()
    """Further arguments of the denoiser with one entry per row."""
    timestep_scale: ClassVar[float] = 1
    separate: ClassVar[bool] = False
    """Whether the negative prompt is encoded, and has its prediction, in a call of its own; else both stand in one batch."""
    calls: ClassVar[int] = 1
    """At most so many denoiser calls per step."""
    encoded: ClassVar[tuple[str, ...]]
    """What `encode_prompt` returns, in order."""
    prompts: ClassVar[tuple[str, ...]] = ("prompt",)
    """The pipeline's arguments that hold a prompt: some have one per text encoder."""
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """Those of the encoders whose tokens the denoiser reads, in the order in which it gets their tokens."""
    blocks: ClassVar[dict[str, str]]
    """Kind of block -> pattern of its module paths."""
    ports: ClassVar[dict[str, Port]]
    """Kind of site -> where its tensor is."""
    attentions: ClassVar[dict[str, Attention]]
    """Kind of site -> the attention itself."""

    def __init_subclass__(cls) -> None:
        BACKBONES.update(dict.fromkeys(cls.pipelines, cls))

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.module: nn.Module = getattr(pipe, self.denoiser)
        self._signature = inspect.signature(type(self.module).forward)

    @classmethod
    def of(cls, pipe: Any) -> Backbone:
        """The backbone of a pipeline, also of a subclass of a known one.

        Raises:
            UnsupportedPipeline: if none knows it.
        """
        for kind in type(pipe).__mro__:
            if kind.__name__ in BACKBONES:
                return BACKBONES[kind.__name__](pipe)
        raise UnsupportedPipeline(f"no backbone knows {type(pipe).__name__}; known: {', '.join(sorted(BACKBONES))}")

    # Three questions that a table cannot answer; the defaults suit batched guidance (SD, SDXL, SD3).

    def layout(self, arguments: Mapping[str, Any]) -> Layout:
        """How many tokens each stream has in a call with these arguments."""
        raise NotImplementedError

    def cond(self, rows: int, turn: int) -> slice:
        """The conditional rows of the `turn`-th call of a step."""
        return slice(rows // 2 if self.pipe.do_classifier_free_guidance else 0, rows)

    def guide(self, predictions: Sequence[Tensor], scale: float) -> Tensor:
        """Combines the predictions of one step's calls as the pipeline does."""
        if not self.pipe.do_classifier_free_guidance:
            return predictions[0]
        uncond, cond = predictions[0].chunk(2)
        return uncond + scale * (cond - uncond)

    def scale(self, predictions: Sequence[Tensor], guided: Tensor) -> float:
        """The guidance scale in use, given the predictions of one step and what the pipeline made of them."""
        if getattr(self.pipe, "_guidance_rescale", 0):
            raise UnsupportedPipeline("an extra branch can't repeat `guidance_rescale`; leave it at 0, or use coupling='coupled'")
        return float(self.pipe.guidance_scale)

    def noise(self, output: Tensor, call: Call) -> Tensor:
        """The part of the denoiser's output that belongs to the image."""
        return output

    def pool(self, prompts: Sequence[str], encode_prompt: Callable[..., Any]) -> Tensor:
        """The pooled embeddings of prompts, [batch, width]."""
        pooled = self.embed(prompts, encode_prompt).pooled
        if pooled is None:
            raise UnsupportedPipeline(f"{type(self).__name__} has no pooled text embedding; give the detector an encoder of its own")
        return pooled

    def pool_first_encoder(self, prompts: Sequence[str]) -> Tensor:
        """The pooled output of the pipeline's first text encoder alone: cheaper than all of `encode_prompt`, [batch, width]."""
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        if tokenizer is None or encoder is None:
            raise UnsupportedPipeline("this pipeline was loaded without its first text encoder; give the detector an encoder of its own")
        length = encoder.config.max_position_embeddings  # tokenizers may claim to have no limit
        ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        return encoder(ids.to(self.pipe._execution_device)).pooler_output  # type: ignore[no-any-return]

    def windows(self, text: str) -> list[str]:
        """A text, and if the first text encoder would cut it off, overlapping pieces that it reads whole.

        FLUX and SD3 follow up to 512 tokens; a detector that reads 77 must not be led past the rest.
        """
        tokenizer, encoder = getattr(self.pipe, "tokenizer", None), getattr(self.pipe, "text_encoder", None)
        if tokenizer is None or encoder is None:
            return [text]
        size = encoder.config.max_position_embeddings - 2
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        if len(ids) <= size:
            return [text]
        return [text, *(tokenizer.decode(ids[start : start + size]) for start in range(0, len(ids) - size // 2, size // 2))]

    @property
    def encoders(self) -> list[tuple[Any, int]]:
        """The tokenizers behind the text that the denoiser reads, each with the position of its first token."""
        found, start = [], 0
        for name in self.tokenizers:
            tokenizer = getattr(self.pipe, name, None)
            if tokenizer is not None:  # SD3 may be loaded without T5
                found.append((tokenizer, start))
                start += padded_length(tokenizer) if name != self.tokenizers[-1] else 0
        return found

    @property
    def latent_scale(self) -> str:
        """How noisy latents are scaled when the denoiser gets them, whatever the scheduler keeps in between.

        Raises:
            UnsupportedPipeline: if the scheduler is of neither known family.
        """
        scheduler = self.pipe.scheduler
        config = scheduler.config
        if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
            return "flow"
        if getattr(scheduler, "alphas_cumprod", None) is not None and config.get("prediction_type") != "flow_prediction":
            return "variance preserving"
        raise UnsupportedPipeline(
            f"the scale of {type(scheduler).__name__}'s latents is unknown, so what reads them can't be trusted; use DDIM, Euler, DPM-Solver, "
            "or (for SD3 and FLUX) a flow-matching scheduler"
        )

    def grid(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents as maps [batch, channels, height, width], packed or not."""
        return latents if latents.ndim == 4 else latents.transpose(1, 2).unflatten(-1, layout.grid)

    # The rest follows from the tables.

    def embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The text and the pooled text that a denoiser call was given."""
        bound = kwargs if self.text in kwargs else self._signature.bind(self.module, *args, **kwargs).arguments
        return bound[self.text], None if self.pooled is None else bound.get(self.pooled)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], turn: int, samples: int) -> Call:
        """The arguments of a denoiser call as a record; `samples` images are being made."""
        bound = self._signature.bind(self.module, *args, **kwargs).arguments
        arguments = {**bound, **bound.get("kwargs", {})}
        for name in ("self", "kwargs"):
            arguments.pop(name, None)
        layout = self.layout(arguments)
        latents, text = arguments.pop(self.latents), arguments.pop(self.text)
        timestep = torch.as_tensor(arguments.pop("timestep")) * self.timestep_scale
        pooled = arguments.pop(self.pooled) if self.pooled else None
        rows = {name: arguments.pop(name) for name in self.rows if arguments.get(name) is not None}
        cond = self.cond(len(latents), turn)
        owners = tuple(range(samples)) if cond.start != cond.stop else ()
        return Call(latents, text, timestep, layout, cond, owners, turn, pooled, rows=rows, rest=arguments)

    def write(self, call: Call) -> dict[str, Any]:
        """A record as the denoiser's arguments."""
        arguments = {self.latents: call.latents, self.text: call.text, "timestep": call.timestep / self.timestep_scale}
        return arguments | ({self.pooled: call.pooled} if self.pooled else {}) | dict(call.rows) | dict(call.rest)

    def embed(self, prompts: Sequence[str], encode_prompt: Callable[..., Any]) -> Embedding:
        """Encodes prompts on their own, without negatives."""
        names = self.encoding_signature(encode_prompt).parameters
        given = {
            "prompt": list(prompts),
            "device": self.pipe._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        required = {name: None for name, p in names.items() if p.default is p.empty and name not in given}
        outputs = encode_prompt(**required, **{name: value for name, value in given.items() if name in names})
        return Embedding(**dict(zip(self.encoded, outputs, strict=False)))

    def encoding_signature(self, encode_prompt: Callable[..., Any]) -> inspect.Signature:
        """That of `encode_prompt`; a wrapper or a subclass may hide the names of its arguments, then it is that of the class they go to."""
        plain = [function for kind in type(self.pipe).__mro__ if (function := vars(kind).get("encode_prompt")) is not None]
        for function in (encode_prompt, *(function.__get__(self.pipe) for function in plain)):
            signature = inspect.signature(function)
            hidden = any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in signature.parameters.values())
            if not hidden and set(self.prompts) <= signature.parameters.keys():
                return signature
        return inspect.signature(encode_prompt)

    def paths(self, block: str) -> list[str]:
        """The paths of all blocks of one kind, in order; the denoiser itself for `prompt`."""
        if block not in self.blocks:
            return [""]
        pattern = re.compile(self.blocks[block].replace(".", r"\.").replace("*", r"\d+"))
        return [path for path, _ in self.module.named_modules() if pattern.fullmatch(path)]

    def sites(self, *kinds: str) -> Iterator[Site]:
        """Every site of the given kinds, e.g. `sites("joint:image", "single.attention")`."""
        for site in map(Site.parse, kinds):
            for index in range(len(self.paths(site.block))):
                yield replace(site, index=index if site.block in self.blocks else None)

    def place(self, site: Site) -> tuple[str, Port | Attention]:
        """The path of a site's module, and how the site's tensor is found there.

        Raises:
            ValueError: if this backbone, or this model, has no such site.
        """
        table: Mapping[str, Port | Attention] = self.attentions if site.stream is None else self.ports
        paths = self.paths(site.block)
        entry = table.get(site.kind)
        if entry is None or (site.index or 0) >= len(paths):
            raise ValueError(
                f"{type(self).__name__} has no site '{site}'; kinds: {', '.join(table)}"
                + (f"; '{site.block}' has {len(paths)} blocks" if entry else "")
            )
        return f"{paths[site.index or 0]}.{entry.module}".strip("."), entry

    def locate(self, site: Site) -> tuple[nn.Module, Port | Attention]:
        """The module of a site, and how the site's tensor is found there; it raises as `place` does."""
        path, entry = self.place(site)
        return self.module.get_submodule(path), entry
