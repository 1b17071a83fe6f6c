"""What happens when a guarded pipeline encodes text: it is read as the encoders read it, judged, and remembered."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .backbone import Backbone
from .errors import PromptRequired, SafetyBypassed
from .flow import Embedding
from .generation import Generation
from .pictures import pictures_in
from .provenance import Known
from .reading import Encoders, Read, Reading, read
from .run import Run


class Encoding:
    """The handlers of a pipeline's `encode_prompt`."""

    def __init__(self, pipe: Any, backbone: Backbone) -> None:
        self.pipe, self.backbone = pipe, backbone

    def __call__(self, generation: Generation, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Encodes the prompts, the negative ones where they have a call of their own, or whatever a callback encodes later."""
        bound = self.backbone.encoding_signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        if generation.run is None:
            return self.prompts(generation, original, bound)
        generation.check("the pipeline")
        first = not generation.provenance.negatives and not generation.run.index and not generation.turn
        return (self.negatives if self.backbone.separate and first else self.further)(generation, original, bound)

    def prompts(self, generation: Generation, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        names, chain = self.backbone.encoded, generation.chain
        given = [_listed(bound.arguments.get(name)) for name in self.backbone.prompts]
        copies = bound.arguments.get("num_images_per_prompt") or 1
        settings = {name: bound.arguments[name] for name in ("max_sequence_length", "clip_skip") if name in bound.arguments}
        outputs, readings = self._read(original, bound, text=given[0] is not None)
        run = generation.run = Run(self.backbone, functools.partial(original, **settings), _wordings(given, copies))
        run.negative_texts = _negative_texts(generation.arguments, self.backbone.prompts)
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
            if generation.overrides("encode"):
                raise PromptRequired("a guard changes the prompt's text, but the pipeline was given `prompt_embeds` alone; pass `prompt`")
            embedding = Embedding(**dict(zip(names, outputs, strict=False)))
        else:
            prompts = [_Prompt(text) for text in given[0]]

            def base(wanted: list[str]) -> Embedding:
                nonlocal outputs
                if self._reword(bound, given, prompts, wanted):
                    outputs = original(*bound.args, **bound.kwargs)
                return Embedding(**dict(zip(names, outputs, strict=False)))

            embedding = generation.fold("encode", base)(list(prompts))
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

    def negatives(self, generation: Generation, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        outputs = original(*bound.args, **bound.kwargs)
        embedding = Embedding(**dict(zip(self.backbone.encoded, outputs, strict=False)))
        generation.provenance.negatives.append(Known(embedding.text, embedding.pooled))
        return outputs

    def further(self, generation: Generation, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
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


class _Prompt(str):
    """A prompt that is told from an equal text which a method put in its place."""


def check_texts(arguments: Mapping[str, Any], prompts: Sequence[str]) -> None:
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


def _negative_texts(arguments: Mapping[str, Any], prompts: Sequence[str]) -> list[list[str]] | None:
    """The negative prompts among a pipeline's arguments; None where they were given as embeddings alone."""
    given = [texts for name in prompts if (texts := _listed(arguments.get(f"negative_{name}"))) is not None]
    return None if not given and arguments.get("negative_prompt_embeds") is not None else given


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


__all__ = ["Encoding", "check_texts"]
