"""One guarded pipeline: what is hooked, and what each hook does with the generation that runs on its thread."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from torch import Tensor

from .backbone import Backbone
from .errors import PromptRequired, SafetyBypassed, UnjudgedImageWarning, UnsupportedPipeline
from .flow import Call, Embedding, Step
from .pictures import bound_arguments, pictures_in
from .method import Method
from .provenance import Known, Provenance
from .reading import Encoders, Read, Reading, read
from .record import Record
from .run import Run
from .settings import Settings
from .tap import Taps
from .wrapping import Seam, seam

SEAMS = ("encode_prompt", "forward", "step", "postprocess", "encode")
"""The bound methods that a guard stands in for: of the pipeline, its denoiser, scheduler, image processor and autoencoder."""


class Handle(Protocol):
    """What an attachment is for its engine."""

    methods: tuple[Method, ...]
    unjudged_images: str

    def began(self, run: Run | None) -> None: ...

    def ended(self, records: list[Record]) -> None: ...


@dataclass(eq=False)
class Generation:
    """A call of the pipeline on one thread: it is alive while that call is on the thread's stack, and at no other time."""

    guards: list[Handle]
    """Innermost first."""
    chain: list[Method]
    """Copies of all their methods, outermost first, which live as long as the generation."""
    arguments: dict[str, Any]
    """Of the pipeline's call, by name."""
    frame: FrameType | None
    unjudged: list[str]
    """Those of them that hold pictures which no method looks at."""
    provenance: Provenance = field(default_factory=Provenance)
    started: int = field(default_factory=time.perf_counter_ns)
    run: Run | None = None
    encoding: bool = False
    turn: int = 0
    """Denoiser calls since the last step."""
    followed: int = 0
    """How many of them followed the prompt."""
    images: list[Any] = field(default_factory=list)
    """What the image processor made, as it left the guard."""
    revoked: bool = False

    @property
    def alive(self) -> bool:
        """Whether it runs on the calling thread."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False


class Engine:
    """All guards of one pipeline, as one chain of methods; those of the latest guard stand outermost."""

    def __init__(self, pipe: Any, backbone: Backbone) -> None:
        self.pipe, self.backbone = pipe, backbone
        self.guards: list[Handle] = []
        self._local = threading.local()
        self._running: set[Generation] = set()
        self._mutex = threading.RLock()
        self._settings: dict[int, Settings] = {}
        self._seams: dict[str, Seam] = {}
        self._taps = Taps(backbone, self._anybody)
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
            if not self.guards:
                self._wrap()
            self._taps.remove()
            self._taps = taps.attach()
            self.guards.append(guard)
            self._settings |= settings

    def drop(self, guard: Handle) -> None:
        """Takes a guard's methods out. Generations under way are withheld: what they have left to do would be unguarded."""
        with self._mutex:
            if guard not in self.guards:
                return
            self.guards.remove(guard)
            for generation in self._running:
                generation.revoked = True
            self._taps.remove()
            self._taps = self._tapped(self.guards).attach()
            for method in guard.methods:
                self._settings.pop(id(method), None)
            if not self.guards:
                for one in self._seams.values():
                    one.drop(self)
                self._seams = {}

    def _tapped(self, guards: Sequence[Handle]) -> Taps:
        taps = Taps(self.backbone, self._anybody)
        for position, method in enumerate(_chained(guards)):
            for site in method.sites(self.backbone):
                taps.add(site, position)
        return taps

    def _wrap(self) -> None:
        denoiser, scheduler, processor = self._parts
        for owner, name, around, outside in (
            (self.pipe, "encode_prompt", self._encode, None),
            (denoiser, "forward", self._denoise, _outside("the denoiser")),
            (scheduler, "step", self._step, _outside("the scheduler")),
            (processor, "postprocess", self._decode, None),
            (getattr(self.pipe, "vae", None), "encode", self._take_in, None),
        ):
            if owner is None:
                continue
            self._seams[name] = seam(owner, name)
            self._seams[name].add(self, around, outside)
        self._seams["forward"].part_of_a_pipeline = True

    def _current_parts(self) -> tuple[Any, ...]:
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
        if any(now is not then for now, then in zip(self._current_parts(), self._parts, strict=True)):
            raise SafetyBypassed("the denoiser, scheduler or image processor was replaced after the guard was attached; attach it again")

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
            raise SafetyBypassed("the pipeline was called from within its own generation (in a callback?), whose state would be lost; wait for it")
        with self._turn():
            generation = self._begin(function, args, kwargs, sys._getframe())
            try:
                output = function(*args, **kwargs)
                records = self._finish(generation, output)
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
            _check_texts(arguments, self.backbone.prompts)
            chain = [self._settings[id(method)].fresh() for method in _chained(guards)]
            generation = Generation(guards, chain, arguments, frame, self._unjudged(guards, chain, arguments))
            self._running.add(generation)
            self._local.generation = generation
        return generation

    def _refresh(self, guards: Sequence[Handle]) -> None:
        """Follows settings that were changed since the last call, and modules that were put in the place of hooked ones (a LoRA's, say)."""
        changed = [method for method in _chained(guards) if self._settings[id(method)].refresh()]
        if changed or self._taps.stale():
            taps = self._tapped(guards)
            self._taps.remove()
            self._taps = taps.attach()

    def _unjudged(self, guards: Sequence[Handle], chain: Sequence[Method], arguments: Mapping[str, Any]) -> list[str]:
        """The arguments with pictures that no method looks at; raises or warns if there are any, as each guard wants it."""
        names = sorted({given.argument for given in pictures_in(arguments)})
        if not names or not chain or any(method.judges_images for method in chain):
            return []
        told = f"{', '.join(f'`{name}`' for name in names)} goes into the image, and no method of this guard looks at images; add pre_filter or post_filter"
        wanted = {guard.unjudged_images for guard in guards}
        if "refuse" in wanted:
            raise SafetyBypassed(f"{told}; the images are withheld")
        if "warn" in wanted:
            warnings.warn(f"{told}, or say guard(…, unjudged_images='accept')", UnjudgedImageWarning, stacklevel=5)
        return names

    def _finish(self, generation: Generation, output: Any) -> list[Record]:
        """The records of a generation that its guards can vouch for."""
        self._alive(generation, "the pipeline")
        run = generation.run
        if run is None:
            raise SafetyBypassed("the pipeline ended without encoding a prompt through the guard; the images are withheld")
        _check_complete(run)
        generation.provenance.settle()
        if any(_overrides(method, "decode") for method in generation.chain):
            _check_examined(generation, output)
        for position, method in enumerate(generation.chain):
            run.check_acted(position, method.name, method.owed())
        position = len(generation.chain)
        for guard in generation.guards:
            position -= len(guard.methods)
            guard.ended(run.records(range(position, position + len(guard.methods))))
        return run.records(range(len(generation.chain)))

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

    def _alive(self, generation: Generation | None, who: str) -> Generation:
        """The generation that is alive on this thread.

        Raises:
            SafetyBypassed: if there is none, or its guard was removed.
        """
        if generation is None or (generation.run is None and who != "the pipeline"):
            raise SafetyBypassed(f"{who} was called outside a guarded generation; call the pipeline, or remove the guard")
        if generation.revoked:
            raise SafetyBypassed("a guard was removed while the pipeline was generating; the images are withheld")
        return generation

    # Each handler below turns one call of the pipeline into a record, and hands it down the chain of methods.

    def _encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generation = self.generation
        if generation is None or generation.encoding:  # a part of an encoding under way
            return original(*args, **kwargs)
        self._alive(generation, "the pipeline")
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        generation.encoding = True
        try:
            if generation.run is None:
                return self._encode_prompts(generation, original, bound)
            if self.backbone.separate and not generation.provenance.negatives and not generation.run.index and not generation.turn:
                return self._encode_negatives(generation, original, bound)
            return self._encode_further(generation, original, bound)
        finally:
            generation.encoding = False

    def _encode_prompts(self, generation: Generation, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        names, chain = self.backbone.encoded, generation.chain
        given = [_listed(bound.arguments.get(name)) for name in self.backbone.prompts]
        negative = [_listed(generation.arguments.get(f"negative_{name}")) for name in self.backbone.prompts]
        copies = bound.arguments.get("num_images_per_prompt") or 1
        settings = {name: bound.arguments[name] for name in ("max_sequence_length", "clip_skip") if name in bound.arguments}
        outputs, readings = self._read(original, bound, text=given[0] is not None)
        run = generation.run = Run(self.backbone, functools.partial(original, **settings), _wordings(given, copies))
        run.negatives = self._negatives(generation, negative, run)
        guided = bool(bound.arguments.get("do_classifier_free_guidance")) and bound.arguments.get("negative_prompt_embeds") is None
        prompt_readings = readings[: len(readings) // 2] if guided and len(readings) % 2 == 0 else readings
        run.readings = _readings(prompt_readings, given, copies, run.images)
        run.pictures, run.unjudged = pictures_in(generation.arguments), generation.unjudged
        for guard in generation.guards:
            guard.began(run)
        for position, method in enumerate(chain):
            method.run, method.position = run, position
        for method in chain:
            method.begin()
        run.begin()
        if given[0] is None:
            if any(_overrides(method, "encode") for method in chain):
                raise PromptRequired("a guard changes the prompt's text, but the pipeline was given `prompt_embeds` alone; pass `prompt`")
            embedding = Embedding(**dict(zip(names, outputs, strict=False)))
        else:
            prompts = [_Prompt(text) for text in given[0]]

            def base(wanted: list[str]) -> Embedding:
                nonlocal outputs
                if self._reword(bound, given, prompts, wanted):
                    outputs = original(*bound.args, **bound.kwargs)
                return Embedding(**dict(zip(names, outputs, strict=False)))

            embedding = self._fold(generation, "encode", base)(list(prompts))
        generation.provenance.prompts.append(Known(embedding.text, embedding.pooled))
        if embedding.negative_text is not None:
            generation.provenance.negatives.append(Known(embedding.negative_text, embedding.negative_pooled))
        return tuple(getattr(embedding, name) for name in names) + tuple(outputs[len(names) :])

    def _read(self, original: Callable[..., Any], bound: inspect.BoundArguments, text: bool) -> tuple[Any, list[Reading]]:
        """What the pipeline encodes, and what its text encoders were given for it.

        Raises:
            SafetyBypassed: if there is text, and no encoder read any.
        """
        with Encoders(self.pipe).watched() as readings:
            outputs = original(*bound.args, **bound.kwargs)
        if text and not readings:
            raise SafetyBypassed(
                "the prompt was not read by the pipeline's text encoders (are its embeddings cached, or made elsewhere?), so nobody can tell what "
                "the denoiser gets; the images are withheld"
            )
        return outputs, readings

    def _reword(
        self, bound: inspect.BoundArguments, given: list[list[str] | None], old: Sequence[str], wanted: Sequence[str]
    ) -> bool:  # fmt: skip
        """Puts changed prompts in the place of those of all encoders; whether there are any."""
        changed = [new is not own and (new != own or not new) for new, own in zip(wanted, old, strict=True)]
        if any(changed):
            for name, texts in zip(self.backbone.prompts, given, strict=True):
                if texts is not None:
                    mixed = [str(new) if other else text for new, text, other in zip(wanted, texts, changed, strict=True)]
                    # A single prompt stays a text: SD compares its type with the negative prompt's.
                    bound.arguments[name] = mixed[0] if isinstance(bound.arguments[name], str) else mixed
        return any(changed)

    def _negatives(self, generation: Generation, given: list[list[str] | None], run: Run) -> list[tuple[str, ...]] | None:
        """The negative texts of each image; None where they were given as embeddings alone."""
        if given[0] is None and generation.arguments.get("negative_prompt_embeds") is not None:
            return None
        prompts = max((len(texts) for texts in given if texts is not None), default=0)
        if not prompts or not run.images:
            return [() for _ in range(run.images)]
        spread = [texts for texts in given if texts is not None]
        return [
            tuple(dict.fromkeys(text for texts in spread if (text := texts[image * len(texts) // run.images]))) for image in range(run.images)
        ]

    def _encode_negatives(self, generation: Generation, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        outputs = original(*bound.args, **bound.kwargs)
        embedding = Embedding(**dict(zip(self.backbone.encoded, outputs, strict=False)))
        generation.provenance.negatives.append(Known(embedding.text, embedding.pooled))
        return outputs

    def _encode_further(self, generation: Generation, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """A prompt that is encoded in the middle of the generation, as prompt schedules do: it is judged like the first."""
        run = generation.run
        assert run is not None
        given = [_listed(bound.arguments.get(name)) for name in self.backbone.prompts]
        outputs, readings = self._read(original, bound, text=given[0] is not None)
        embedding = Embedding(**dict(zip(self.backbone.encoded, outputs, strict=False)))
        wordings = _wordings(given, bound.arguments.get("num_images_per_prompt") or 1)
        if wordings is None or len(wordings) != run.images:
            return outputs  # what it is for can't be told; if the denoiser gets it, the guard will say so
        further = run.with_texts(wordings, _readings(readings, given, len(wordings) // len(given[0] or [""]), len(wordings)))
        for method in generation.chain:
            method.meet(further)
        generation.provenance.prompts.append(Known(embedding.text, embedding.pooled))
        if embedding.negative_text is not None:
            generation.provenance.negatives.append(Known(embedding.negative_text, embedding.negative_pooled))
        return outputs

    def _denoise(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generation = self._alive(self.generation, "the denoiser")
        run = generation.run
        assert run is not None
        call = self._identified(generation, run, args, kwargs)
        output: list[Any] = []
        wants_tuple = kwargs.get("return_dict") is False

        def base(call: Call) -> Tensor:
            run.call = call
            with self._taps.watching(call, generation.chain):
                output[:] = [original(**self.backbone.write(call) | {"return_dict": not wants_tuple})]
            return self.backbone.noise(output[0][0], call)

        noise = self._fold(generation, "denoise", base)(run.without_negatives(call))
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
        if generation.turn > backbone.calls or (backbone.separate and (generation.followed > 1 or generation.turn - generation.followed > 1)):
            raise SafetyBypassed(
                "the denoiser was called more often than the pipeline calls it in one step (by a callback, or was the scheduler's `step` replaced?), "
                "so the guard can't tell which prediction counts; the images are withheld"
            )
        provenance.check(call.text, call.pooled, call.cond)
        return call

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generation = self._alive(self.generation, "the scheduler")
        run = generation.run
        assert run is not None
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

        latents = self._fold(generation, "step", base)(Step(noise, timestep, sample, rest))
        run.index, generation.turn, generation.followed = run.index + 1, 0, 0
        return (latents,) if wants_tuple else _replaced(output, "prev_sample", latents)

    def _decode(self, original: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        generation = self.generation
        if generation is None or generation.run is None:  # a direct use of the image processor, outside a generation
            return original(image, *args, **kwargs)
        run = self._alive(generation, "the image processor").run
        assert run is not None
        output_type = inspect.signature(original).bind(image, *args, **kwargs).arguments.get("output_type", "pil")
        decoding = any(_overrides(method, "decode") for method in generation.chain)
        if decoding and output_type == "latent":
            raise SafetyBypassed("a guard examines or changes images, but the pipeline was asked for latents; use another output_type")
        if decoding and len(image) != run.images:
            raise SafetyBypassed(f"a guard examines {run.images} images, and {len(image)} were decoded on their own; decode them together")
        run.preview = run.index < run.total  # in a callback: guarded like the images, but no part of the record
        made = self._fold(generation, "decode", lambda images: original(images, *args, **kwargs))(image)
        run.preview = False
        generation.images.append(made)
        return made

    def _take_in(self, original: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        generation = self.generation
        if generation is not None and generation.run is not None:
            for method in self._alive(generation, "the autoencoder").chain:
                method.take_in(image)
        return original(image, *args, **kwargs)

    @staticmethod
    def _fold(generation: Generation, verb: str, base: Callable[[Any], Any]) -> Callable[[Any], Any]:
        for method in reversed(generation.chain):
            base = functools.partial(_swapped, getattr(method, verb), base)
        return base


class _Prompt(str):
    """A prompt that is told from an equal text which a method put in its place."""


def _outside(who: str) -> Callable[..., Any]:
    def refuse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise SafetyBypassed(f"{who} was called outside a guarded generation; call the pipeline, or remove the guard")

    return refuse


def _chained(guards: Sequence[Handle]) -> Iterator[Method]:
    """The methods of all guards, outermost first."""
    for guard in reversed(guards):
        yield from guard.methods


def _swapped(verb: Callable[..., Any], following: Callable[[Any], Any], flowing: Any) -> Any:
    return verb(flowing, following)


def _replaced(output: list[Any], name: str, value: Tensor) -> Any:
    """The output of the latest call with another value in it, of the class that callers know."""
    if not output:  # a method that never asked
        raise SafetyBypassed("a method gave a result without calling what it wraps; the images are withheld")
    kind = type(output[-1])
    return kind(**{**dict(output[-1].items()), name: value})


def _check_texts(arguments: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """Raises ValueError for a prompt that is no text."""
    for name in (*prompts, *(f"negative_{name}" for name in prompts)):
        value = arguments.get(name)
        if isinstance(value, (list, tuple)) and not value:
            raise ValueError(f"{name} is an empty list; give at least one text")
        for place, text in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if value is None:
                continue
            where = f"{name}[{place}]" if isinstance(value, (list, tuple)) else name
            if not isinstance(text, str):
                raise ValueError(f"{where}={text!r} is no text: a prompt is a str, or a list of them")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where} has half a character (a lone surrogate) at {error.start}; decode the text as UTF-8") from None


def _check_complete(run: Run) -> None:
    if run.index == 0 or run.index < run.total:
        raise SafetyBypassed(
            f"the guard saw {run.index} of {run.total} steps; the images are withheld (was the generation interrupted, or the "
            "scheduler replaced?)"
        )


def _check_examined(generation: Generation, output: Any) -> None:
    """Raises unless the images that leave are the latest ones that the guard examined."""
    if not generation.images:
        raise SafetyBypassed("a guard examines or changes images, but none were decoded; use another output_type")
    latest = generation.images[-1]
    leaving = output if latest is output else output[0] if isinstance(output, (tuple, list)) else getattr(output, "images", output)
    same = leaving is latest or (
        isinstance(leaving, list) and isinstance(latest, list) and len(leaving) == len(latest) and all(a is b for a, b in zip(leaving, latest, strict=True))
    )
    if not same:
        raise SafetyBypassed("the pipeline returned other images than those that a guard examined; the images are withheld")


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


def _readings(readings: Sequence[Reading], given: list[list[str] | None], copies: int, images: int) -> list[Read]:
    """What encoders read for each image, beyond its texts. A row that belongs to no certain prompt counts for all images."""
    prompts = [prompts for prompts in given if prompts is not None]
    if not prompts:
        return [Read() for _ in range(images)]
    count = len(prompts[0])
    found: list[list[Read]] = [[] for _ in range(count)]
    for reading in readings:
        for row in range(len(reading.rows)):
            owners = [row] if len(reading.rows) == count else range(count)
            for owner in owners:
                found[owner].append(read(reading, row, [texts[owner] for texts in prompts]))
    merged = [functools.reduce(operator.or_, own, Read()) for own in found]
    return [one for one in merged for _ in range(copies)]


def _batch(backbone: Backbone, args: Any, kwargs: Any) -> int:
    """How many images a first call makes, where only embeddings are known."""
    rows = len(kwargs[backbone.latents] if backbone.latents in kwargs else args[0])
    cond = backbone.cond(rows, 0)
    return cond.stop - cond.start


__all__ = ["SEAMS", "Engine", "Generation"]
