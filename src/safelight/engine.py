"""One guarded pipeline: what is hooked, and what each hook does with the generation that runs on its thread."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

from torch import Tensor

from .backbone import Backbone
from .conflicts import check_denoiser
from .encoding import Encoding, check_texts
from .errors import SafetyBypassed
from .flow import Call, Step
from .generation import Generation, Handle, outside
from .method import Method
from .pictures import bound_arguments
from .run import Run
from .settings import Settings
from .tap import Taps
from .unjudged import unjudged, with_watched_callbacks
from .wrapping import Seam, seam

SEAMS = ("encode_prompt", "forward", "step", "postprocess", "encode")
"""The bound methods that a guard stands in for: of the pipeline, its denoiser, scheduler, image processor and autoencoder."""


class Engine:
    """All guards of one pipeline, as one chain of methods; those of the latest guard stand outermost."""

    def __init__(self, pipe: Any, backbone: Backbone) -> None:
        self.pipe, self.backbone = pipe, backbone
        self.guards: list[Handle] = []
        self._half: Handle | None = None
        """The guard that is being attached or removed."""
        self._local = threading.local()
        self._running: set[Generation] = set()
        self._mutex = threading.RLock()
        self._settings: dict[int, Settings] = {}
        self._seams: dict[str, Seam] = {}
        self._taps = Taps(backbone, self._anybody)
        self._encoding = Encoding(pipe, backbone)
        self._parts = self._current_parts()

    # Attachments.

    def add(self, guard: Handle) -> None:
        """Puts a guard's methods around those that are there.

        Raises:
            SafetyBypassed: from within a generation of this pipeline.
        """
        if self.generation is not None:
            raise SafetyBypassed("guards can't be attached in the middle of a generation; attach them before the pipeline is called")
        self._check_conflicts()
        settings = {id(method): Settings.of(method) for method in guard.methods}
        with self._turn(), self._mutex:
            taps = self._tapped([*self.guards, guard])  # a failure leaves all as it is
            self._half = guard
            self._settings |= settings
            if not self.guards:
                self._wrap()
            self._retap(taps)
            self.guards.append(guard)
            self._half = None

    def drop(self, guard: Handle) -> None:
        """Takes a guard's methods out, also those of one that was attached half-way; whoever is interrupted here may call it again.

        Generations under way are withheld: what they have left to do would be unguarded.
        """
        with self._mutex:
            if guard not in self.guards and guard is not self._half:
                return
            self._half = guard
            rest = [one for one in self.guards if one is not guard]
            for generation in self._running:
                generation.revoked = True
            self._retap(self._tapped(rest))
            if not rest:
                self._unwrap()
            for method in guard.methods:
                self._settings.pop(id(method), None)
            self.guards = rest
            self._half = None

    def _retap(self, taps: Taps) -> None:
        """Puts taps in the place of those that are there."""
        self._taps.remove()
        self._taps = taps
        taps.attach()

    def _tapped(self, guards: Sequence[Handle]) -> Taps:
        taps = Taps(self.backbone, self._anybody)
        for position, method in enumerate(_chained(guards)):
            for site in method.sites(self.backbone):
                taps.add(site, position)
        return taps

    def _wrap(self) -> None:
        for owner, name, around, beyond in self._places():
            there = self._seams[name] = seam(owner, name)
            there.add(self, around, beyond)
        self._seams["forward"].part_of_a_pipeline = True

    def _unwrap(self) -> None:
        """Takes the seams off, also one that `_wrap` was interrupted at."""
        found = {id(one): one for owner, name, *_ in self._places() if isinstance(one := vars(owner).get(name), Seam)}
        for one in (found | {id(one): one for one in self._seams.values()}).values():
            one.drop(self)
        self._seams = {}

    def _places(self) -> list[tuple[Any, str, Callable[..., Any], Callable[..., Any] | None]]:
        """What has a seam, its name, and what is done with calls in a generation and outside any."""
        denoiser, scheduler, processor, autoencoder = self._parts
        places = [
            (self.pipe, "encode_prompt", self._encode, None),
            (denoiser, "forward", self._denoise, _outside("the denoiser")),
            (scheduler, "step", self._step, _outside("the scheduler")),
            (processor, "postprocess", self._decode, None),
            (autoencoder, "encode", self._take_in, None),
        ]
        return [place for place in places if place[0] is not None]

    def _current_parts(self) -> tuple[Any, ...]:
        return (
            getattr(self.pipe, self.backbone.denoiser), self.pipe.scheduler, self.pipe.image_processor, getattr(self.pipe, "vae", None)
        )  # fmt: skip

    def _check_conflicts(self) -> None:
        check_denoiser(getattr(self.pipe, self.backbone.denoiser))
        if any(now is not then for now, then in zip(self._current_parts(), self._parts, strict=True)):
            raise SafetyBypassed(
                "the denoiser, scheduler, image processor or autoencoder was replaced after the guard was attached; attach it again"
            )

    # Generations.

    @property
    def generation(self) -> Generation | None:
        """The generation that is alive on this thread."""
        found: Generation | None = getattr(self._local, "generation", None)
        return found if found is not None and found.alive else None

    def since(self) -> int | None:
        """When the generation that is alive on this thread began; see `Seam`."""
        generation = self.generation
        return None if generation is None else generation.started

    def _anybody(self) -> bool:
        """Whether this or another guarded pipeline that shares the denoiser generates on this thread."""
        return "forward" in self._seams and self._seams["forward"].busy

    def generate(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls the pipeline under its guards; one thread at a time, for its scheduler holds state.

        Raises:
            SafetyBypassed: if any guard can't vouch for the result.
        """
        if self.generation is not None:
            raise SafetyBypassed(
                "the pipeline was called from within its own generation (in a callback?), whose state would be lost; wait for it"
            )
        with self._turn():
            generation = self._begin(function, args, kwargs, sys._getframe())
            args, kwargs = with_watched_callbacks(generation, args, kwargs)
            try:
                output = function(*args, **kwargs)
                records = generation.finish(output)
            finally:
                self._end(generation)
        if hasattr(output, "__dict__"):
            output.records = records
        return output

    def _turn(self) -> AbstractContextManager[Any]:
        """What lets one thread at a time use the scheduler, whichever guarded pipelines share it."""
        return self._seams["step"].lock if "step" in self._seams else nullcontext()

    def _begin(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], frame: FrameType) -> Generation:
        with self._mutex:
            guards = list(self.guards)
            if not guards:
                raise SafetyBypassed("the guard was removed while this call waited for its turn; call the pipeline again")
            for guard in guards:
                guard.began(None)
            self._check_conflicts()
            self._follow_offloading()
            self._refresh(guards)
            arguments = bound_arguments(function, args, kwargs)
            check_texts(arguments, self.backbone.prompts)
            chain = [self._settings[id(method)].fresh() for method in _chained(guards)]
            generation = Generation(guards, chain, arguments, frame, unjudged(guards, chain, arguments))
            self._running.add(generation)
            self._local.generation = generation
        return generation

    def _refresh(self, guards: Sequence[Handle]) -> None:
        """Follows settings that were changed since the last call, and modules that were put in the place of hooked ones (a LoRA's, say)."""
        changed = [method for method in _chained(guards) if self._settings[id(method)].refresh()]
        if changed or self._taps.stale():
            self._retap(self._tapped(guards))

    def _end(self, generation: Generation) -> None:
        """Forgets a generation, however it ended."""
        if generation.run is not None:
            generation.run.call = None
        self._local.generation = None
        generation.frame = None
        generation.chain.clear()
        self._running.discard(generation)
        self._follow_offloading()

    def _follow_offloading(self) -> None:
        """Puts the seam on again where offloading has hooked the denoiser anew, and so unwrapped it."""
        if "forward" in self._seams and hasattr(self.backbone.module, "_hf_hook"):
            self._seams["forward"].renew()

    def _current(self, who: str) -> tuple[Generation, Run]:
        """The generation that is alive on this thread, and its state.

        Raises:
            SafetyBypassed: if there is none.
        """
        generation = self.generation
        if generation is None:
            raise outside(who)
        return generation, generation.check(who)

    # Each handler below turns one call of the pipeline into a record, and hands it down the chain of methods.

    def _encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generation = self.generation
        if generation is None or generation.encoding:  # a part of an encoding under way
            return original(*args, **kwargs)
        generation.encoding = True
        try:
            return self._encoding(generation, original, *args, **kwargs)
        finally:
            generation.encoding = False

    def _denoise(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generation, run = self._current("the denoiser")
        call = self._identified(generation, run, args, kwargs)
        output: list[Any] = []
        wants_tuple = kwargs.get("return_dict") is False

        before = run.flagged

        def base(call: Call) -> Tensor:
            call = call if run.flagged == before else run.without_negatives(call)  # a method found it unsafe in this very call
            run.call = call
            with self._taps.watching(call, generation.chain):
                output[:] = [original(**self.backbone.write(call) | {"return_dict": not wants_tuple})]
            return self.backbone.noise(output[0][0], call)

        noise = generation.fold("denoise", base)(run.without_negatives(call))
        run.call = call
        return (noise,) if wants_tuple else _replaced(output, "sample", noise)

    def _identified(self, generation: Generation, run: Run, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """A denoiser call as a record, once it is certain whose prompt it follows.

        Raises:
            SafetyBypassed: if its embeddings weren't encoded in this generation, or the denoiser is called more often than the pipeline does.
        """
        backbone, provenance = self.backbone, generation.provenance
        turn = generation.turn
        if backbone.separate:
            text, pooled = backbone.embeddings(args, kwargs)
            turn = 0 if provenance.is_prompt(text, pooled) else 1
        call = backbone.read(tuple(args), kwargs, turn, run.images or _batch(backbone, args, kwargs))
        run.images = run.images or len(call.samples)
        generation.turn += 1
        generation.followed += call.conditional
        prompts = call.cond.stop - call.cond.start
        if (call.conditional and prompts != run.images) or len(call.text) != len(call.latents):
            raise SafetyBypassed(
                f"the denoiser got {len(call.text)} rows of text for {len(call.latents)} rows of latents, and {run.images} images are being made "
                "(does a callback cut `prompt_embeds`, as diffusers' CFG cut-off does for a batch?); the images are withheld"
            )
        if generation.turn > backbone.calls or (
            backbone.separate and (generation.followed > 1 or generation.turn - generation.followed > 1)
        ):
            raise SafetyBypassed(
                "the denoiser was called more often than the pipeline calls it in one step (by a callback, or was the scheduler's `step` replaced?), "
                "so the guard can't tell which prediction counts; the images are withheld"
            )
        scale = getattr(self.pipe, "_guidance_scale", None)
        if isinstance(scale, (int, float)) and not scale >= 0:
            raise SafetyBypassed(
                f"the guidance scale is {scale:g}, which leads towards the negative prompt and away from the one that was judged; the images are "
                "withheld. Give one of at least 0, and what should be drawn as the prompt"
            )
        provenance.check(call.text, call.pooled, call.cond)
        return call

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generation, run = self._current("the scheduler")
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        rest = {**bound, **bound.get("kwargs", {})}
        rest.pop("kwargs", None)
        noise, timestep, sample = rest.pop("model_output"), rest.pop("timestep"), rest.pop("sample")
        if not generation.followed:
            raise SafetyBypassed(
                "the scheduler moved on although the guarded denoiser was not called; was it replaced, compiled or cached?"
            )
        if run.index >= run.total:
            raise SafetyBypassed(f"the scheduler moved more often than the {run.total} steps of this generation; the images are withheld")
        wants_tuple = rest.get("return_dict") is False
        output: list[Any] = []

        def base(step: Step) -> Tensor:
            output[:] = [original(step.noise, step.timestep, step.latents, **dict(step.rest) | {"return_dict": not wants_tuple})]
            return output[0][0]  # type: ignore[no-any-return]

        latents = generation.fold("step", base)(Step(noise, timestep, sample, rest))
        run.index, generation.turn, generation.followed = run.index + 1, 0, 0
        return (latents,) if wants_tuple else _replaced(output, "prev_sample", latents)

    def _decode(self, original: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        generation = self.generation
        if generation is None or generation.run is None:  # a direct use of the image processor, outside a generation
            return original(image, *args, **kwargs)
        run = generation.check("the image processor")
        output_type = inspect.signature(original).bind(image, *args, **kwargs).arguments.get("output_type", "pil")
        decoding = generation.overrides("decode")
        if decoding and output_type == "latent":
            raise SafetyBypassed("a guard examines or changes images, but the pipeline was asked for latents; use another output_type")
        if decoding and len(image) != run.images:
            raise SafetyBypassed(f"a guard examines {run.images} images, and {len(image)} were decoded on their own; decode them together")
        run.preview = run.index < run.total  # in a callback: guarded like the images, but no part of the record
        made = generation.fold("decode", lambda images: original(images, *args, **kwargs))(image)
        run.preview = False
        generation.images.append(made)
        return made

    def _take_in(self, original: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        generation = self.generation
        if generation is not None and generation.run is not None:
            generation.check("the autoencoder")
            for method in generation.chain:
                method.take_in(image)
        return original(image, *args, **kwargs)


def _outside(who: str) -> Callable[..., Any]:
    def refuse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise outside(who)

    return refuse


def _chained(guards: Sequence[Handle]) -> Iterator[Method]:
    """The methods of all guards, outermost first."""
    for guard in reversed(guards):
        yield from guard.methods


def _replaced(output: list[Any], name: str, value: Tensor) -> Any:
    """The output of the latest call with another value in it, of the class that callers know."""
    if not output:  # a method that never asked
        raise SafetyBypassed("a method gave a result without calling what it wraps; the images are withheld")
    kind = type(output[-1])
    return kind(**{**dict(output[-1].items()), name: value})


def _batch(backbone: Backbone, args: Any, kwargs: Any) -> int:
    """How many images a first call makes, where only embeddings are known."""
    rows = len(kwargs[backbone.latents] if backbone.latents in kwargs else args[0])
    cond = backbone.cond(rows, 0)
    return cond.stop - cond.start


__all__ = ["SEAMS", "Engine"]
