"""A generation is a call of the guarded pipeline on its thread; nothing else counts, and nothing is left behind."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight import Method, guard
from safelight.attach import guards_of
from safelight.backbone import Backbone
from safelight.errors import SafetyBypassed, UnjudgedImageWarning
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.sld import SLD
from safelight.testing import Containing, sample, tiny_pipeline
from safelight.testing.state import assert_close, assert_same_state, state_of

SAFE, UNSAFE = "a cat on a beach", "a knife on a beach"


def block() -> Block:
    return Block(detector=Containing())


def sibling_of(pipe: Any) -> Any:
    """Another pipeline object on the same components."""
    extra = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
    made = type(pipe).__mro__[1](**pipe.components, **extra) if vars(pipe).get("_safelight") else type(pipe)(**pipe.components, **extra)
    made.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size"):
        made.default_sample_size = pipe.default_sample_size
    return made


def in_thread(task: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(task())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "a thread waits for ever"
    return found[0]


def fail(*_: Any) -> dict[str, Any]:
    raise ConnectionError("the client went away")


# Liveness.


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, MemoryError])
def test_after_a_failure_a_sibling_is_still_refused(pipe: Any, error: type[BaseException]) -> None:
    def die(*_: Any) -> dict[str, Any]:
        raise error("on purpose")

    sibling = sibling_of(pipe)
    with guard(pipe, block()):
        for _ in range(2):
            with pytest.raises(error):
                sample(pipe, SAFE, callback_on_step_end=die)
            with pytest.raises(SafetyBypassed, match="outside a guarded generation"):
                sample(sibling, UNSAFE)
    sample(sibling, UNSAFE)


def test_a_sibling_in_another_thread_is_refused_while_one_generates(sd: Any) -> None:
    sibling, got = sibling_of(sd), []

    def meanwhile(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            got.append(in_thread(lambda: sample(sibling, UNSAFE)))
        return values

    with guard(sd, block()):
        sample(sd, SAFE, callback_on_step_end=meanwhile)
    assert isinstance(got[0], SafetyBypassed)


def test_a_sibling_inside_a_generation_is_refused(sd: Any) -> None:
    sibling = sibling_of(sd)

    def nested(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        sample(sibling, UNSAFE)
        return values

    with guard(sd, block()), pytest.raises(SafetyBypassed):
        sample(sd, SAFE, callback_on_step_end=nested)


def test_a_nested_call_is_refused_and_swallowing_that_changes_nothing(pipe: Any) -> None:
    refused = []

    def nested(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        try:
            sample(pipe, UNSAFE)
        except SafetyBypassed as error:
            refused.append(error)
        return values

    expected = sample(pipe, SAFE)
    with guard(pipe, block()) as handle:
        assert torch.equal(sample(pipe, SAFE, callback_on_step_end=nested), expected)
        assert [record.prompt for record in handle.records] == [SAFE]
    assert len(refused) == 3
    assert "from within its own generation" in str(refused[0])


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_guard_that_is_removed_while_generating_withholds_the_images(pipe: Any, elsewhere: bool) -> None:
    expected = sample(pipe, UNSAFE)
    before = state_of(pipe)
    handle = guard(pipe, DualLatent(detector=Containing()))

    def remove(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            in_thread(handle.remove) if elsewhere else handle.remove()
        return values

    with pytest.raises(SafetyBypassed, match="removed while the pipeline was generating"):
        sample(pipe, UNSAFE, callback_on_step_end=remove)
    assert not guards_of(pipe)
    assert_same_state(pipe, before, "after remove()")
    assert torch.equal(sample(pipe, UNSAFE), expected)


def test_one_of_two_guards_that_is_removed_while_generating_counts_too(sd: Any) -> None:
    outer = guard(sd, block())
    with guard(sd, Method()):

        def remove(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            outer.remove()
            return values

        with pytest.raises(SafetyBypassed, match="removed while"):
            sample(sd, UNSAFE, callback_on_step_end=remove)


def test_guards_are_not_attached_in_the_middle(sd: Any) -> None:
    def attach(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        guard(pipe, Method())
        return values

    with guard(sd, block()), pytest.raises(SafetyBypassed, match="in the middle of a generation"):
        sample(sd, SAFE, callback_on_step_end=attach)
    assert not guards_of(sd)


# Records.


def test_records_travel_with_their_generation(pipe: Any) -> None:
    with guard(pipe, block()) as handle:
        output = pipe(**arguments(pipe, UNSAFE))
        assert [record.prompt for record in output.records] == [UNSAFE]
        assert in_thread(lambda: handle.records) == [], "another thread's records"
        assert [record.prompt for record in in_thread(lambda: pipe(**arguments(pipe, SAFE)).records)] == [SAFE]
        assert [record.prompt for record in handle.records] == [UNSAFE]
        with pytest.raises(ConnectionError):
            pipe(**arguments(pipe, SAFE), callback_on_step_end=fail)
        assert handle.records == [], "records of an earlier generation after one that failed"
        assert isinstance(pipe(**arguments(pipe, SAFE), return_dict=False), tuple)
        assert [record.prompt for record in handle.records] == [SAFE]


def arguments(pipe: Any, prompt: str) -> dict[str, Any]:
    given = {"prompt": prompt, "num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    if type(pipe).__name__ == "FluxKontextPipeline":
        size = pipe.default_sample_size * pipe.vae_scale_factor
        given |= {"image": torch.rand(1, 3, size, size), "max_area": size * size, "_auto_resize": False}
    return given


# Siblings and copies.


@pytest.mark.parametrize("order", ["in", "out"])
def test_two_guarded_siblings_work_and_come_off_in_any_order(pipe: Any, order: str) -> None:
    sibling = sibling_of(pipe)
    expected = sample(pipe, SAFE)
    before = state_of(pipe)
    first, second = guard(pipe, block()), guard(sibling, DualLatent(detector=Containing()))
    assert torch.equal(sample(pipe, SAFE), expected)
    assert torch.equal(sample(sibling, SAFE), expected)
    assert in_thread(lambda: torch.equal(sample(sibling, SAFE), expected)) is True
    sample(sibling, UNSAFE)
    assert second.records[0].flagged
    for one in (first, second) if order == "in" else (second, first):
        one.remove()
        if order == "in" and one is first:
            with pytest.raises(SafetyBypassed, match="outside a guarded generation"):
                sample(pipe, SAFE)
            sample(sibling, SAFE)
    assert_same_state(pipe, before, "after both guards are gone")
    assert torch.equal(sample(pipe, SAFE), expected)


def test_siblings_with_sites_mind_their_own_calls(flux: Any) -> None:
    class Count(Method):
        seen: list[int] = []

        def sites(self, backbone: Backbone) -> Any:
            return ["joint.0:image", "single.0.attention"]

        def edit(self, site: Any, tokens: Tensor) -> Tensor:
            self.seen.append(self.run.images)
            return tokens

    sibling = sibling_of(flux)
    with guard(flux, Count()), guard(sibling, Count()):
        sample(flux, [SAFE, SAFE], guided=False)
        assert set(Count.seen) == {2}
        Count.seen.clear()
        sample(sibling, SAFE, guided=False)
        assert set(Count.seen) == {1}


def test_copies_are_whole_and_as_guarded(pipe: Any) -> None:
    expected = sample(pipe, SAFE)
    with guard(pipe, block()):
        deep, shallow = copy.deepcopy(pipe), copy.copy(pipe)
        scheduler = copy.deepcopy(pipe.scheduler)
        with pytest.raises(SafetyBypassed, match="can't be copied alone"):
            copy.deepcopy(Backbone.of(pipe).module)
        with pytest.raises(SafetyBypassed, match="can't be pickled"):
            pickle.dumps(pipe)
    assert scheduler.step.__self__ is scheduler
    for clone in (deep, shallow):
        (handle,) = guards_of(clone)
        assert torch.equal(sample(clone, SAFE), expected)
        assert not torch.equal(sample(clone, UNSAFE), sample(deep, SAFE))
        assert handle.records[0].flagged or clone is deep
        handle.remove()
        assert torch.equal(sample(clone, SAFE), expected)
        assert not any(name in vars(clone) for name in ("encode_prompt", "_safelight"))
    module = Backbone.of(deep).module
    for parameter in module.parameters():
        parameter.data.zero_()
    assert not torch.equal(sample(deep, SAFE), expected), "the copy draws with the original's denoiser"
    assert torch.equal(sample(pipe, SAFE), expected)


def test_a_copy_of_a_denoiser_with_hooks_is_clean() -> None:
    class Scale(Method):
        def sites(self, backbone: Backbone) -> Any:
            return ["joint.0:image", "joint.1.attention"]

        def edit(self, site: Any, tokens: Tensor) -> Tensor:
            return tokens * 1.5

    pipe = tiny_pipeline("sd3")
    bare = sample(pipe, SAFE)
    with guard(pipe, Scale()):
        scaled = sample(pipe, SAFE)
        clone = copy.deepcopy(pipe)
    assert torch.equal(sample(clone, SAFE), scaled)
    guards_of(clone)[0].remove()
    assert torch.equal(sample(clone, SAFE), bare)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in clone.transformer.modules())


def test_a_module_that_replaces_a_hooked_one_is_hooked() -> None:
    class Zero(Method):
        def sites(self, backbone: Backbone) -> Any:
            return ["prompt:text"]

        def edit(self, site: Any, tokens: Tensor) -> Tensor:
            return tokens * 0

    class Wrapped(nn.Module):  # as peft puts a LoRA's layer in the place of a linear one
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, tokens: Tensor) -> Tensor:
            return self.base(tokens) + tokens.mean()

    sd3 = tiny_pipeline("sd3")
    with guard(sd3, Zero()) as handle:
        first = sample(sd3, SAFE)
        own = sd3.transformer.context_embedder
        sd3.transformer.context_embedder = Wrapped(own)
        after = sample(sd3, SAFE)
        handle.remove()
        guard(sd3, Zero())
        assert torch.equal(sample(sd3, SAFE), after), "the edit reaches only a part of the layer"
        guards_of(sd3)[0].remove()
        sd3.transformer.context_embedder = own
    with guard(sd3, Zero()):
        assert torch.equal(sample(sd3, SAFE), first)


# Pictures that go in.


def test_pictures_that_nobody_looks_at_are_told() -> None:
    kontext = tiny_pipeline("kontext")
    with guard(kontext, block()) as handle:
        with pytest.warns(UnjudgedImageWarning, match="`image` goes into the image, and no method of this guard looks at images"):
            sample(kontext, SAFE)
        assert handle.records[0].unjudged == ["image"]
    with guard(kontext, block(), unjudged_images="refuse"), pytest.raises(SafetyBypassed, match="`image` goes into the image"):
        sample(kontext, SAFE)
    with warnings.catch_warnings(), guard(kontext, block(), unjudged_images="accept") as handle:
        warnings.simplefilter("error")
        sample(kontext, SAFE)
        assert handle.records[0].unjudged == ["image"]
    with pytest.raises(ValueError, match="unjudged_images='maybe' is not one of"):
        guard(kontext, block(), unjudged_images="maybe")  # type: ignore[arg-type]


# Guards that did not act.


def test_who_flags_and_does_nothing_is_told(pipe: Any) -> None:
    class Idle(Method):
        def begin(self) -> None:
            self.note(0, flagged=True, action="promised")

    with guard(pipe, Idle(), unjudged_images="accept"), pytest.raises(SafetyBypassed, match="did nothing about image 0"):
        sample(pipe, UNSAFE)


def test_a_warm_up_that_never_ends_is_told(sd: Any) -> None:
    with guard(sd, SLD(concept="a knife", warmup=1.0)), pytest.raises(SafetyBypassed, match=r"sld was to act.*schedule"):
        sample(sd, SAFE)
    bare = sample(sd, SAFE)
    with guard(sd, SLD(concept="a knife", warmup=1.0, scale=0.0)):
        assert torch.equal(sample(sd, SAFE), bare)


# Settings.


def test_settings_that_change_between_calls_are_followed_and_checked(sd: Any) -> None:
    method = DualLatent(detector=Containing())
    with guard(sd, method) as handle:
        first = sample(sd, UNSAFE)
        method.safe_weight = 0.1
        assert not torch.equal(sample(sd, UNSAFE), first)
        assert handle.records[0].actions[0].strength == pytest.approx(0.1)
        method.safe_weight = 7
        with pytest.raises(ValueError, match="safe_weight=7 is out of range"):
            sample(sd, UNSAFE)
        method.safe_weight = 0.75
        assert torch.equal(sample(sd, UNSAFE), first)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("block", "str is no method: build it first"),
        (None, "NoneType is no method"),
        (Block, "type is no method"),
        ([1], "int is no method"),
    ],
)
def test_what_is_no_method_is_told(sd: Any, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        guard(sd, given)
    assert not guards_of(sd)


def test_lists_of_methods_are_methods(sd: Any) -> None:
    with guard(sd, [block(), (Method(),)]) as handle:
        assert len(handle.methods) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["x", 5], r"prompt\[1\]=5 is no text"),
        (b"knife", "is no text"),
        ("a\ud800b", "lone surrogate"),
        ([], "empty list"),
        ([["a"]], "is no text"),
    ],
)
def test_odd_prompts_are_told(pipe: Any, prompt: Any, message: str) -> None:
    with guard(pipe, block()), pytest.raises(ValueError, match=message):
        sample(pipe, prompt)


# Loops of other people's.


def test_outputs_are_what_subclasses_expect(sd: Any) -> None:
    seen: list[Any] = []

    def look(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return values

    unet, step = sd.unet.forward, sd.scheduler.step
    with guard(sd, block()):
        guarded_unet, guarded_step = sd.unet.forward, sd.scheduler.step

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = guarded_unet(*args, **kwargs | {"return_dict": True})
            assert torch.equal(output[0], output["sample"])
            assert output.sample is output[0]
            seen.append(output)
            return (output.sample,)

        def move(*args: Any, **kwargs: Any) -> Any:
            output = guarded_step(*args, **{name: value for name, value in kwargs.items() if name != "return_dict"})
            assert output.pred_original_sample.shape == output.prev_sample.shape
            return (output[0],)

        move.__signature__ = __import__("inspect").signature(step)  # type: ignore[attr-defined]
        sd.unet.forward, sd.scheduler.step = forward, move
        try:
            sample(sd, SAFE, callback_on_step_end=look)
        finally:
            sd.unet.forward, sd.scheduler.step = guarded_unet, guarded_step
    assert len(seen) == 3
    assert unet is not None


def test_a_preview_is_guarded_and_no_part_of_the_record(sd: Any) -> None:
    shown: list[Tensor] = []

    def preview(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        image = pipe.vae.decode(values["latents"] / pipe.vae.config.scaling_factor, return_dict=False)[0]
        shown.append(pipe.image_processor.postprocess(image, output_type="pt"))
        return values

    expected = sample(sd, SAFE)
    with guard(sd, block()) as handle:
        assert torch.equal(sample(sd, SAFE, callback_on_step_end=preview), expected)
        assert shown[0].std() > 0
        shown.clear()
        sample(sd, UNSAFE, callback_on_step_end=preview)
        assert all(one.std() == 0 for one in shown), "a preview of a refused image"
        assert handle.records[0].actions[0].action == "refused"


def test_other_images_than_the_examined_ones_dont_leave(sd: Any) -> None:
    kind = type(sd)

    class Swapping(kind):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            output.images = torch.zeros_like(output.images)
            return output

    pipe = Swapping(**sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with guard(pipe, block()), pytest.raises(SafetyBypassed, match="other images than those that a guard examined"):
        sample(pipe, UNSAFE)
    with guard(pipe, DualLatent(detector=Containing())):
        sample(pipe, UNSAFE)


# Negative prompts.


def test_the_negative_prompt_of_a_flagged_image_is_left_out(pipe: Any) -> None:
    negative = "a spoon at night"
    prompts = [SAFE, UNSAFE]
    plain = sample(pipe, prompts, negative_prompt=[negative, negative])
    with guard(pipe, DualLatent(detector=Containing()), unjudged_images="accept") as handle:
        images = sample(pipe, prompts, negative_prompt=[negative, negative])
        records = handle.records
        without = sample(pipe, prompts, negative_prompt=[negative, ""])
    assert torch.equal(images[0], plain[0]), "a benign image keeps its negative prompt, bit for bit"
    assert_close(images[1:], without[1:], "a flagged image is led by its negative prompt", tolerance=1e-5)
    first, second = (record.negative for record in records)
    assert first is not None
    assert second is not None
    assert (first.left_out, second.left_out) == (False, True)
    assert first.prompt == negative
    assert first.score == 0.0


def test_negative_prompts_are_judged_for_the_record(sd: Any) -> None:
    with guard(sd, DualLatent(detector=Containing())) as handle:
        sample(sd, SAFE, negative_prompt="a knife")
    (record,) = handle.records
    assert not record.flagged, "who excludes knives names them"
    assert record.negative is not None
    assert record.negative.flagged
    assert record.to_json()["negative"]["prompt"] == "a knife"


@pytest.mark.parametrize("scale", [-3.0, float("nan")])
def test_a_negative_guidance_scale_makes_no_prompt_of_the_negative_one(scale: float) -> None:
    for name in ("sd", "sd3"):
        pipe = tiny_pipeline(name)
        with guard(pipe, block()), pytest.raises(SafetyBypassed, match="leads towards the negative prompt"):
            sample(pipe, SAFE, negative_prompt=UNSAFE, guidance_scale=scale)

    def turn(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = scale
        return values

    with guard(pipe, block()), pytest.raises(SafetyBypassed):
        sample(pipe, SAFE, callback_on_step_end=turn)
