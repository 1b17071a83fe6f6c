"""What a method must keep to."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import bundle
from ..attach import guard
from ..errors import SafelightError
from ..flow import Step
from ..method import Method
from .state import assert_close, assert_identical, assert_same_state, state_of
from .tiny import NAMES, sample, tiny_pipeline

SAFE = ("a cat on a beach", "a dog in the snow")
UNSAFE = ("a knife on a beach", "a big knife at night")

Factory = Callable[[Any], Method]


def check_method(method_factory: Factory, pipes: Iterable[Any] | None = None, *, selective: bool = True) -> None:
    """Checks a method on pipelines that understand short prompts and make small images; by default on all of `tiny_pipeline`'s.

    Args:
        method_factory: makes a fresh method for a pipeline. Its detector, if any, must flag prompts that contain the word
            "knife" and no others, as `Containing()` does.
        pipes: pipelines.
        selective: whether the method leaves alone what its detector does not flag. Else it acts on every sample.

    Combinations of pipeline and guidance that the method refuses with an error that says why are left out.

    Raises:
        AssertionError: if the method leaves something behind, remembers an earlier generation, treats a sample differently
            in company, touches a sample that is not flagged, does nothing to one that is, can't be stacked, or can't be
            saved and loaded.
    """
    for pipe in [tiny_pipeline(name) for name in NAMES] if pipes is None else pipes:
        accepted = [guided for guided in (True, False) if not _refuses(method_factory, pipe, guided)]
        assert accepted, f"the method refuses {type(pipe).__name__} with guidance and without"
        for guided in accepted:
            check_rows(method_factory, pipe, guided, selective)
        for check in (check_detachment, check_memory, check_stacking, check_bundle):
            check(method_factory, pipe, accepted[0])
        if selective:
            check_idle(method_factory, pipe, accepted[0])


def check_idle(method_factory: Factory, pipe: Any, guided: bool = True) -> None:
    """Samples that are not flagged are bit-identical to the pipeline's own."""
    cases: list[tuple[Any, dict[str, Any]]] = [
        (SAFE[0], {}),
        ([*SAFE, *SAFE], {}),
        (SAFE[0], {"num_images_per_prompt": 2}),
    ]
    expected = [sample(pipe, prompts, guided=guided, **changes) for prompts, changes in cases]
    with guard(pipe, method_factory(pipe), unjudged_images="accept") as handle:
        for (prompts, changes), images in zip(cases, expected, strict=True):
            assert_identical(sample(pipe, prompts, guided=guided, **changes), images, f"the method changes the harmless {prompts!r}")
            assert not any(record.flagged for record in handle.records), f"the harmless {prompts!r} is flagged"


def check_rows(method_factory: Factory, pipe: Any, guided: bool = True, selective: bool = True) -> None:
    """A batch equals its rows run alone; rows that are not flagged are those of the same batch without the method."""
    prompts, flagged = [SAFE[0], UNSAFE[0], SAFE[1], UNSAFE[1]], [1, 3]
    expected = sample(pipe, prompts, guided=guided)
    with guard(pipe, method_factory(pipe), unjudged_images="accept") as handle:
        batch = sample(pipe, prompts, guided=guided)
        records = handle.records
        alone = torch.cat([sample(pipe, prompt, seeds=[seed], guided=guided) for seed, prompt in enumerate(prompts)])
        copies = sample(pipe, [SAFE[0], UNSAFE[0]], num_images_per_prompt=2, guided=guided)
        pairs = [
            sample(pipe, prompt, seeds=seeds, num_images_per_prompt=2, guided=guided)
            for prompt, seeds in ((SAFE[0], [0, 1]), (UNSAFE[0], [2, 3]))
        ]
    assert_close(batch, alone, "a batch differs from its rows run alone")
    assert_close(copies, torch.cat(pairs), "several images per prompt differ from those of each prompt alone")
    assert len(records) == len(prompts), f"{len(records)} records for {len(prompts)} images"
    if selective:
        assert [i for i, record in enumerate(records) if record.flagged] == flagged, "the records don't tell which images were flagged"
        assert_identical(batch[[0, 2]], expected[[0, 2]], "a sample that is not flagged changes when another one is")
    for index in flagged:
        assert not torch.equal(batch[index], expected[index]), f"the method does nothing about {prompts[index]!r}"
        assert any(action.action != "none" for action in records[index].actions), "a changed image has no record of what was done"


def check_detachment(method_factory: Factory, pipe: Any, guided: bool = True) -> None:
    """After `remove` all is as it was, also after an exception in the middle of a generation."""
    expected, before = sample(pipe, UNSAFE[0], guided=guided), state_of(pipe)
    with guard(pipe, method_factory(pipe), unjudged_images="accept"):
        guarded = sample(pipe, UNSAFE[0], guided=guided)
    assert_same_state(pipe, before, "after remove()")
    assert_identical(sample(pipe, UNSAFE[0], guided=guided), expected, "after remove(), images differ")
    with guard(pipe, method_factory(pipe), unjudged_images="accept"):
        _interrupt(pipe, guided)
        assert_identical(sample(pipe, UNSAFE[0], guided=guided), guarded, "a generation after an exception differs")
        _interrupt(pipe, guided)
    assert_same_state(pipe, before, "after an exception and remove()")
    assert_identical(sample(pipe, UNSAFE[0], guided=guided), expected, "after an exception and remove(), images differ")


def check_memory(method_factory: Factory, pipe: Any, guided: bool = True) -> None:
    """A generation neither depends on earlier ones nor leaves anything in memory."""
    alive: list[weakref.ref[Any]] = []

    def look(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        generation = handle._engine.generation
        assert generation is not None, "there is no generation in its own callback"
        alive.extend(map(weakref.ref, generation.chain))
        return given

    with guard(pipe, method_factory(pipe), unjudged_images="accept") as handle:
        first = sample(pipe, UNSAFE[0], guided=guided, callback_on_step_end=look)
        sample(pipe, [SAFE[0], UNSAFE[1]], guided=guided, steps=4)
        assert_identical(sample(pipe, UNSAFE[0], guided=guided), first, "the same seed gives another image the second time")
        gc.collect()
        assert alive, "the method did not take part in the generation"
        assert not any(reference() for reference in alive), "the method's memory of a generation outlives it"


def check_stacking(method_factory: Factory, pipe: Any, guided: bool = True) -> None:
    """The method works inside and outside another one, and next to one that does nothing."""
    with guard(pipe, method_factory(pipe), unjudged_images="accept"):
        alone = sample(pipe, UNSAFE[0], guided=guided)
    for methods in ((Method(), method_factory(pipe)), (method_factory(pipe), Method())):
        with guard(pipe, *methods, unjudged_images="accept"):
            assert_identical(sample(pipe, UNSAFE[0], guided=guided), alone, "beside an idle method, the method gives another image")
    for methods in ((Shift(), method_factory(pipe)), (method_factory(pipe), Shift())):
        with guard(pipe, *methods, unjudged_images="accept") as handle:
            images = sample(pipe, UNSAFE[0], guided=guided)
        assert torch.isfinite(images).all(), "stacked with another method, the method gives no finite image"
        names = [action.method for action in handle.records[0].actions]
        assert len(names) == 2, f"two methods acted, but the record names {names}"


def check_bundle(method_factory: Factory, pipe: Any, guided: bool = True) -> None:
    """Saved and loaded, the method makes the same image; nothing in its bundle is a pickle."""
    method = method_factory(pipe)
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(folder, method, made_for=type(pipe).__name__)
        for file in Path(folder).rglob("*"):
            assert file.suffix in {".json", ".safetensors"}, f"a bundle holds JSON and safetensors, but this one {file.name}"
        loaded = bundle.load(folder, made_for=type(pipe).__name__)
    images = []
    for methods in ([method], loaded):
        with guard(pipe, *methods, unjudged_images="accept"):
            images.append(sample(pipe, UNSAFE[0], guided=guided))
    # Weights may be stored in half precision.
    assert_close(images[1], images[0], "saved and loaded, the method gives another image", tolerance=1e-2)


class Shift(Method):
    """Changes a little in every step: the other method of a stack."""

    def begin(self) -> None:
        """Says that it acts."""
        for image in range(self.run.images):
            self.note(image, action="shifted")

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        """Scales the latents."""
        return advance(step) * 0.99


def _refuses(method_factory: Factory, pipe: Any, guided: bool) -> bool:
    method = method_factory(pipe)
    try:
        with guard(pipe, method, unjudged_images="accept"):
            sample(pipe, UNSAFE[0], guided=guided)
    except (SafelightError, ValueError) as error:
        assert len(str(error)) > 30, f"the method refuses {type(pipe).__name__}, but says no more than {str(error)!r}"
        return True
    return False


class _Interrupted(Exception):
    pass


def _interrupt(pipe: Any, guided: bool) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise _Interrupted

    try:
        sample(pipe, UNSAFE[0], guided=guided, callback_on_step_end=fail)
    except _Interrupted:
        return
    raise AssertionError("the pipeline swallowed an exception")
