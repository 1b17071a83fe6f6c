"""Attaches methods to a diffusers pipeline, and takes them off again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from . import backbones as _known  # noqa: F401  (makes the backbones known)
from .backbone import Backbone
from .errors import PromptRequired, SafetyBypassed, UnsupportedPipeline
from .flow import Call, Embedding, Step
from .method import Method
from .record import Record
from .run import Run
from .schema import check
from .tap import Taps
from .wrapping import Turnstile, wrap


@dataclass
class _Progress:
    """How far one generation has come."""

    active: bool = False
    encoded: bool = False
    decoded: bool = False
    turn: int = 0
    """Denoiser calls since the last step."""


def guard(pipe: Any, *methods: Method) -> Guard:
    """Attaches `methods` to `pipe`; the first is the outermost. Use as a context manager, or call `.remove()`.

    Raises:
        UnsupportedPipeline: if no backbone knows the pipeline, or something attached to it conflicts with guards.
        ValueError: if a method names a site that the denoiser doesn't have, or a field is out of range.
    """
    for method in methods:
        if is_dataclass(method):
            check(method)
    return Guard(pipe, methods)


class Guard:
    """The handle of an attachment, in the manner of PyTorch's `RemovableHandle`."""

    def __init__(self, pipe: Any, methods: tuple[Method, ...]) -> None:
        self.pipe, self.methods = pipe, methods
        self.backbone = Backbone.of(pipe)
        self.run: Run | None = None
        """The latest generation."""
        self.records: list[Record] = []
        """What was done to each image of the latest generation that ended well."""
        self._chain: list[Method] = []  # the copies that live for one generation
        self._progress = _Progress()
        self._turnstile = Turnstile(pipe)
        self._renewals: dict[str, Callable[[], None]] = {}
        self._seams = self._current_seams()
        self._undo = ExitStack()
        self._check_conflicts()
        with ExitStack() as stack:  # a failure half-way detaches what was attached
            self._attach(stack)
            self._undo = stack.pop_all()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Detaches the methods; the pipeline is as it was."""
        self._undo.close()
        self._chain = []

    def _attach(self, stack: ExitStack) -> None:
        for owner, name, around in (
            (self.pipe, "check_inputs", self._begin),
            (self.pipe, "encode_prompt", self._encode),
            (self.backbone.module, "forward", self._denoise),
            (self.pipe.scheduler, "step", self._step),
            (self.pipe.image_processor, "postprocess", self._decode),
            (self.pipe, "maybe_free_model_hooks", self._end),
        ):
            self._renewals[name] = wrap(stack, owner, name, around)
        self._taps = Taps(self.backbone, stack)
        for position, method in enumerate(self.methods):
            for site in method.sites(self.backbone):
                self._taps.add(site, functools.partial(self._method, position))

    def _method(self, position: int) -> Method:
        return self._chain[position]

    def _current_seams(self) -> tuple[Any, ...]:
        return getattr(self.pipe, self.backbone.denoiser), self.pipe.scheduler, self.pipe.image_processor

    def _check_conflicts(self) -> None:
        module = getattr(self.pipe, self.backbone.denoiser)
        states = [vars(part) for part in module.modules()]
        if getattr(module, "is_cache_enabled", False) or any(_skips_blocks(state) for state in states):
            raise UnsupportedPipeline("a block cache skips blocks and with them the guard; call `disable_cache()` on the denoiser first")
        if any(state.get("_compiled_call_impl") is not None or "_orig_mod" in state["_modules"] for state in states):
            raise UnsupportedPipeline(
                "the denoiser is compiled, and its activations are out of reach; attach the guard to the plain module"
            )
        if self._current_seams() != self._seams:
            raise SafetyBypassed("the denoiser, scheduler or image processor was replaced after the guard was attached; attach it again")

    # Each handler below turns one call of the pipeline into a record, and hands it down the chain of methods.

    def _fold(self, verb: str, base: Callable[[Any], Any]) -> Callable[[Any], Any]:
        for method in reversed(self._chain):
            base = functools.partial(_swapped, getattr(method, verb), base)
        return base

    def _begin(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._turnstile.enter()
        self._check_conflicts()
        self.run, self.records, self._chain = None, [], []
        self._progress = _Progress()
        result = original(*args, **kwargs)
        self._chain = [copy(method) for method in self.methods]
        self._progress.active = True
        return result

    def _encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (
            self._progress.encoded or not self._progress.active
        ):  # FLUX encodes the negative prompt in a second call; users may encode at will
            return original(*args, **kwargs)
        self._progress.encoded = True
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        given = [_listed(bound.arguments.get(name)) for name in self.backbone.prompts]
        settings = {name: bound.arguments[name] for name in ("max_sequence_length", "clip_skip") if name in bound.arguments}
        encode_prompt = functools.partial(original, **settings)
        self.run = run = Run(self.backbone, encode_prompt, _wordings(given, bound.arguments.get("num_images_per_prompt") or 1))
        for position, method in enumerate(self._chain):
            method.run, method.position = run, position
        for method in self._chain:
            method.begin()
        if given[0] is None:
            if any(_overrides(method, "encode") for method in self.methods):
                raise PromptRequired("a guard changes the prompt's text, but the pipeline was given `prompt_embeds` alone; pass `prompt`")
            return original(*args, **kwargs)
        names = self.backbone.encoded
        outputs: list[Any] = []

        def base(prompts: list[str]) -> Embedding:
            for name, texts in zip(self.backbone.prompts, given, strict=True):  # a prompt that was changed is changed for all encoders
                if texts is not None:
                    changed = [new if new != old else text for new, old, text in zip(prompts, given[0] or (), texts, strict=True)]
                    # A single prompt stays a text: SD compares its type with the negative prompt's.
                    bound.arguments[name] = changed[0] if isinstance(bound.arguments[name], str) else changed
            outputs[:] = original(*bound.args, **bound.kwargs)
            return Embedding(**dict(zip(names, outputs, strict=False)))

        embedding = self._fold("encode", base)(list(given[0]))
        return tuple(getattr(embedding, name) for name in names) + tuple(outputs[len(names) :])

    def _denoise(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._active("the denoiser")
        call = self.backbone.read(args, kwargs, self._progress.turn, run.images or _batch(self.backbone, args, kwargs))
        run.images = run.images or len(call.samples)
        if call.conditional and call.cond.stop - call.cond.start != run.images:
            raise SafetyBypassed(f"the denoiser got {call.cond.stop - call.cond.start} conditional rows for {run.images} images")
        self._progress.turn += 1

        def base(call: Call) -> Tensor:
            run.call = call
            with self._taps.watching(call):
                return self.backbone.noise(original(**self.backbone.write(call) | {"return_dict": False})[0], call)

        noise = self._fold("denoise", base)(call)
        run.call = call
        return (noise,) if kwargs.get("return_dict") is False else SimpleNamespace(sample=noise)

    def _step(self, original: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **rest: Any) -> Any:
        run = self._active("the scheduler")
        if not self._progress.turn:
            raise SafetyBypassed(
                "the scheduler moved on although the guarded denoiser was not called; was it replaced, compiled or cached?"
            )

        def base(step: Step) -> Tensor:
            return original(step.noise, step.timestep, step.latents, **dict(step.rest) | {"return_dict": False})[0]

        latents = self._fold("step", base)(Step(model_output, timestep, sample, rest))
        run.index, self._progress.turn = run.index + 1, 0
        return (latents,) if rest.get("return_dict") is False else SimpleNamespace(prev_sample=latents)

    def _decode(self, original: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._progress.active:  # a direct use of the image processor, outside a generation
            return original(image, *args, **kwargs)
        run = self._active("the image processor")
        self._check_complete(run)
        output_type = inspect.signature(original).bind(image, *args, **kwargs).arguments.get("output_type", "pil")
        if output_type == "latent" and any(_overrides(method, "decode") for method in self.methods):
            raise SafetyBypassed("a guard examines or changes images, but the pipeline was asked for latents; use another output_type")
        self._progress.decoded = True
        return self._fold("decode", lambda images: original(images, *args, **kwargs))(image)

    def _end(self, original: Callable[..., Any]) -> Any:
        if self._progress.active and self.run is not None:
            self._check_complete(self.run)
            if not self._progress.decoded and any(_overrides(method, "decode") for method in self.methods):
                raise SafetyBypassed("a guard examines or changes images, but none were decoded; use another output_type")
            self.records = self.run.records(len(self._chain))
            self.run.call = None
        elif self._progress.active:
            raise SafetyBypassed("the pipeline ended without encoding a prompt through the guard; the images are withheld")
        self._chain, self._progress = [], _Progress()  # with the copies goes all that this generation remembered
        try:
            result = original()
            if hasattr(self.backbone.module, "_hf_hook"):  # offloading has just hooked the denoiser anew, and unwrapped it
                self._renewals["forward"]()
            return result
        finally:
            self._turnstile.leave()  # not before the models are offloaded: the next generation would find them moving

    def _active(self, who: str) -> Run:
        if not self._progress.active or self.run is None:
            raise SafetyBypassed(f"{who} was called outside a guarded generation; call the pipeline, or remove the guard")
        return self.run

    def _check_complete(self, run: Run) -> None:
        if run.index == 0 or run.index < run.total:
            raise SafetyBypassed(
                f"the guard saw {run.index} of {run.total} steps; the images are withheld (was the generation interrupted, or the "
                "scheduler replaced?)"
            )


def _swapped(verb: Callable[..., Any], following: Callable[[Any], Any], flowing: Any) -> Any:
    return verb(flowing, following)


def _skips_blocks(state: dict[str, Any]) -> bool:
    """Whether a diffusers hook may leave the module of this state out: caches can be applied without `enable_cache`."""
    hooks = getattr(state.get("_diffusers_hook"), "hooks", {})
    return any(word in name for name in hooks for word in ("cache", "fbc", "broadcast", "layer_skip"))


def _overrides(method: Method, verb: str) -> bool:
    return getattr(type(method), verb) is not getattr(Method, verb)


def _listed(prompt: Any) -> list[str] | None:
    return [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)


def _wordings(given: list[list[str] | None], images_per_prompt: int) -> list[tuple[str, ...]] | None:
    """The texts that describe each image, in the order in which pipelines repeat prompts."""
    texts = [prompts for prompts in given if prompts is not None]
    if not texts:
        return None
    return [tuple(dict.fromkeys(wording)) for wording in zip(*texts, strict=True) for _ in range(images_per_prompt)]


def _batch(backbone: Backbone, args: Any, kwargs: Any) -> int:
    """How many images a first call makes, where only embeddings are known."""
    rows = len(kwargs[backbone.latents] if backbone.latents in kwargs else args[0])
    cond = backbone.cond(rows, 0)
    return cond.stop - cond.start


__all__ = ["Guard", "guard"]
