"""SafeRedir watches a generation, and changes its prompt where it has to."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy

from safelight import Method, guard
from safelight.backbone import Backbone
from safelight.bundle import load, save
from safelight.errors import ArtefactError, UnsupportedPipeline
from safelight.flow import Call
from safelight.methods.gate import Gate
from safelight.methods.negative_prompt import NegativePrompt
from safelight.methods.saferedir import SafeRedir
from safelight.nets.official_redirector import OfficialRedirector
from safelight.nets.redirector import Aim
from safelight.nets.redirector import Redirector as Network
from safelight.redirector import Redirector, rounded
from safelight.testing import NAMES, Containing, check_method, sample, tiny_pipeline
from safelight.testing.methods import SAFE, UNSAFE
from safelight.training.trajectories import Trajectory

BATCH = [SAFE[0], UNSAFE[0], SAFE[1], UNSAFE[1]]


class Witness(Method):
    """Sees what the denoiser is given."""

    def begin(self) -> None:
        self.calls: list[Call] = CALLS

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        self.calls.append(call)
        return denoise(call)


CALLS: list[Call] = []
COUNTS: list[int] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    CALLS.clear()
    COUNTS.clear()


@functools.cache
def learnt(name: str) -> Network:
    """A network that has learnt which of the suite's prompts speak of a knife."""
    pipe, trajectory = tiny_pipeline(name), Trajectory()
    with guard(pipe, trajectory):
        sample(pipe, [*SAFE, *UNSAFE], steps=3)
    (text, pooled), (latents, _) = trajectory.prompts, trajectory.kept[0]
    assert text is not None
    torch.manual_seed(0)
    net = Network(latents.shape[1], text.shape[2], 0 if pooled is None else pooled.shape[1], width=32, rank=8, heads=2)
    wanted = torch.tensor([0] * len(SAFE) + [1] * len(UNSAFE))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        logits, _ = net(torch.randn_like(latents, dtype=torch.float32), text, torch.rand(len(text)) * 1000, pooled)
        optimizer.zero_grad()
        cross_entropy(logits, wanted).backward()
        optimizer.step()
    with torch.no_grad():
        net.mask[-1].bias.fill_(2.0)
        net.alpha[-1].bias.fill_(2.0)
    return rounded(net)  # type: ignore[return-value]


def redirector(name: str, **changes: Any) -> Redirector:
    backbone = Backbone.of(tiny_pipeline(name))
    model = {"denoiser": type(backbone.module).__name__, "latent_scale": backbone.latent_scale}
    return Redirector(learnt(name), **{"concept": "knife", "threshold": 0.5, "model": model} | changes)


def saferedir(name: str, **fields: Any) -> SafeRedir:
    return SafeRedir(redirectors=(redirector(name),), **{"hold": 1.0} | fields)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_every_promise(name: str) -> None:
    check_method(lambda pipe: saferedir(name), [tiny_pipeline(name)])


@pytest.mark.parametrize("name", NAMES)
def test_only_unsafe_conditional_rows_get_another_prompt(name: str) -> None:
    pipe = tiny_pipeline(name)
    with guard(pipe, Witness()):
        sample(pipe, BATCH)
    plain, guarded = list(CALLS), []
    CALLS.clear()
    with guard(pipe, saferedir(name), Witness()) as handle:
        sample(pipe, BATCH)
    guarded = list(CALLS)
    for before, after in zip(plain, guarded, strict=True):
        changed = (before.text != after.text).flatten(1).any(1)
        rows = range(len(before.text))[before.cond] if before.conditional else range(0)
        assert [row for row in range(len(before.text)) if changed[row]] == [rows[i] for i in (1, 3) if rows]
        if before.pooled is not None:
            assert torch.equal((before.pooled != after.pooled).any(1), changed)
    actions = [record.actions[0] for record in handle.records]
    assert [action.action for action in actions] == ["none", "redirected", "none", "redirected"]
    assert actions[1].steps == (0, 3)
    assert actions[1].concept == "knife"
    assert 0 < (actions[1].strength or 0) <= 2
    assert handle.run is not None
    assert {event["image"] for event in handle.run.events} == {1, 3}


@pytest.mark.parametrize(("steps", "cooldown"), [(7, 2), (6, 2), (5, 0), (4, 9)])
def test_what_is_always_unsafe_is_read_once_per_cooldown(steps: int, cooldown: int) -> None:
    pipe = tiny_pipeline("sd")
    method = Counting(redirectors=(redirector("sd"),), threshold=0.0, hold=0.0, cooldown=cooldown)
    with guard(pipe, method):
        sample(pipe, UNSAFE[0], steps=steps)
    assert [math.ceil(steps / (cooldown + 1))] == COUNTS


@pytest.mark.parametrize(("interval", "expected"), [(1, 6), (3, 2), (9, 1)])
def test_what_looks_safe_is_read_again_after_an_interval(interval: int, expected: int) -> None:
    pipe = tiny_pipeline("sd")
    method = Counting(redirectors=(redirector("sd"),), interval=interval)
    with guard(pipe, method):
        sample(pipe, SAFE[0], steps=6)
    assert [expected] == COUNTS


class Counting(SafeRedir):
    """Tells how often networks were asked."""

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        COUNTS.append(self.calls)
        return decode(images)


def test_the_first_step_is_protected_unless_near_published() -> None:
    pipe = tiny_pipeline("sd")
    with guard(pipe, Witness()):
        sample(pipe, UNSAFE[0])
    plain = [call.text for call in CALLS]
    CALLS.clear()
    with guard(pipe, SafeRedir.near_published([redirector("sd")]), Witness()):
        sample(pipe, UNSAFE[0])
    late = [call.text for call in CALLS]
    assert torch.equal(late[0], plain[0])
    assert not torch.equal(late[1][:1], plain[1][:1]), "the released code moves the unconditional rows"
    CALLS.clear()
    with guard(pipe, saferedir("sd"), Witness()):
        sample(pipe, UNSAFE[0])
    assert not torch.equal(CALLS[0].text, plain[0])
    assert torch.equal(CALLS[0].text[:1], plain[0][:1])


@pytest.mark.parametrize("fields", [{"alpha_scale": 0.0}, {"threshold": 1.0}])
def test_strength_zero_and_an_unreachable_threshold_change_nothing(fields: dict[str, Any]) -> None:
    pipe = tiny_pipeline("sd")
    expected = sample(pipe, [*UNSAFE])
    with guard(pipe, saferedir("sd", **fields)):
        assert torch.equal(sample(pipe, [*UNSAFE]), expected)


def test_mask_and_alpha_have_an_effect() -> None:
    pipe, images = tiny_pipeline("sd"), []
    for fields in ({}, {"masked": False}, {"adaptive": False}, {"alpha_scale": 0.6}):
        with guard(pipe, saferedir("sd", **fields)):
            images.append(sample(pipe, UNSAFE[0]))
    for i, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[i + 1 :])


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_another_scheduler_shows_the_network_latents_of_the_same_scale(scheduler: Any) -> None:
    pipe = tiny_pipeline("sd")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with guard(pipe, saferedir("sd"), Witness()) as handle:
        sample(pipe, [SAFE[0], UNSAFE[0]], steps=4)
    assert [record.flagged for record in handle.records] == [False, True]
    assert 0.5 < float(CALLS[0].latents.std()) < 1.5


def test_a_scheduler_of_unknown_scale_is_refused() -> None:
    pipe = tiny_pipeline("sd")
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(UnsupportedPipeline, match=r"scale of EDMEulerScheduler's latents is unknown.*use DDIM"):
        guard(pipe, saferedir("sd"))


def test_redirectors_of_another_model_are_refused() -> None:
    with pytest.raises(ArtefactError, match="denoiser is UNet2DConditionModel, and this one's is FluxTransformer2DModel"):
        guard(tiny_pipeline("flux"), saferedir("sd"))
    other = Redirector(Network(4, 64, width=32, rank=8).eval(), "knife")
    pipe = tiny_pipeline("sd")
    with guard(pipe, SafeRedir(redirectors=(other,))), pytest.raises(ArtefactError, match="reads text width 64, this model has 16"):
        sample(pipe, SAFE[0])
    with pytest.raises(ArtefactError, match="has no redirector"):
        guard(pipe, SafeRedir(redirectors=()))


def test_another_methods_extra_prompt_is_judged_on_its_own() -> None:
    class Both(Method):
        """Asks for a second prediction, under another prompt."""

        def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
            other = self.run.encode(UNSAFE[0]).text.expand(len(call.samples), -1, -1)
            noise = denoise(call)
            SEEN.append(denoise(call.with_text(other)))
            return noise

    SEEN: list[Tensor] = []
    pipe = tiny_pipeline("sd")
    expected = sample(pipe, SAFE[0])
    with guard(pipe, Both(), saferedir("sd"), Witness()) as handle:
        images = sample(pipe, SAFE[0])
        raw = handle.run.encode(UNSAFE[0]).text  # type: ignore[union-attr]
    assert torch.equal(images, expected), "the image's own prompt is safe"
    seconds = CALLS[1::2]
    assert len(seconds) == 3
    assert not any(torch.equal(call.text[call.cond], raw) for call in seconds), "the extra prompt was let through"


def test_a_gate_confines_it() -> None:
    pipe = tiny_pipeline("sd")
    expected = sample(pipe, BATCH)
    with guard(pipe, Gate(detector=Containing(word="night"), method=saferedir("sd"))):
        images = sample(pipe, BATCH)
    assert torch.equal(images[:3], expected[:3])
    assert not torch.equal(images[3], expected[3])


def test_a_weak_mask_moves_its_strongest_token_all_the_way() -> None:
    mask = torch.tensor([[0.0, 0.01, 0.02], [0.0, 0.0, 0.0]])
    aim = Aim(torch.zeros(2, 3, 4), mask, torch.full((2, 3, 1), 0.5), None)
    torch.testing.assert_close(saferedir("sd")._strength(aim)[..., 0], torch.tensor([[0.0, 0.25, 0.5], [0.0, 0.0, 0.0]]))


def test_it_stacks_with_another_guard() -> None:
    pipe = tiny_pipeline("sd")
    with guard(pipe, NegativePrompt(words="knife"), saferedir("sd")) as handle:
        sample(pipe, UNSAFE[0])
    assert [action.method for action in handle.records[0].actions] == ["negative_prompt", "saferedir"]


def test_several_concepts_are_noted_by_the_surest() -> None:
    pipe = tiny_pipeline("sd")
    with guard(pipe, SafeRedir(redirectors=(redirector("sd"), redirector("sd", concept="blade", threshold=0.4)))) as handle:
        sample(pipe, UNSAFE[0])
    action = handle.records[0].actions[0]
    assert action.flagged
    assert action.concept in ("knife", "blade")
    assert (action.strength or 0) <= 2 + 1e-5


# Files


def test_a_bundle_holds_several_redirectors(tmp_path: Path) -> None:
    save(tmp_path, SafeRedir(redirectors=(redirector("sd"), redirector("sd", concept="blade")), alpha_scale=2.0))
    (method,) = load(tmp_path, changes={"saferedir.cooldown": 4})
    assert isinstance(method, SafeRedir)
    assert [one.concept for one in method.redirectors] == ["knife", "blade"]
    assert (method.alpha_scale, method.cooldown) == (2.0, 4)
    for name, tensor in learnt("sd").state_dict().items():
        assert torch.equal(method.redirectors[0].net.state_dict()[name], tensor)


def test_an_official_checkpoint_is_converted_and_guards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = OfficialRedirector(4, 16, 16).eval()
    torch.save(net.state_dict(), tmp_path / "best_model.pt")
    made = Redirector.from_official(tmp_path / "best_model.pt", "nudity")
    assert made.architecture == "official"
    pipe = tiny_pipeline("sd")
    with guard(pipe, SafeRedir(redirectors=(made,), threshold=0.0)) as handle:
        sample(pipe, UNSAFE[0])
    assert handle.records[0].flagged
    made.save(tmp_path / "redirector.safetensors")
    again = Redirector.load(tmp_path / "redirector.safetensors")
    assert torch.allclose(again.net.state_dict()["pos_embed"], net.pos_embed, atol=1e-2)


class Malicious:
    """What a pickle can do to who loads it."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(RAN), "executed")


RAN = ""


def test_a_checkpoint_with_code_in_it_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RAN", str(tmp_path / "ran"))
    torch.save({"latent_encoder.0.conv.0.weight": Malicious()}, tmp_path / "bad.pt")
    (tmp_path / "worse.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name in ("bad.pt", "worse.pt", "junk.pt"):
        with pytest.raises(ArtefactError, match="was not loaded, as it holds more than tensors"):
            Redirector.from_official(tmp_path / name, "x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1, 2], "no plain state dict"),
        ({"a": torch.zeros(1)}, "lacks 'latent_encoder.0.conv.0.weight'"),
        (
            {"latent_encoder.0.conv.0.weight": torch.zeros(64, 4, 3, 3), "pos_embed": torch.zeros(1, 77, 768)},
            "doesn't fit the architecture",
        ),
    ],
)
def test_other_checkpoints_are_refused(state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ArtefactError, match=message):
        Redirector.from_official(tmp_path / "model.pt", "x")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="can't be read as a redirector"):
        Redirector.load(tmp_path / "missing.safetensors")
    with pytest.raises(ArtefactError, match="there is no checkpoint"):
        Redirector.from_official(tmp_path / "missing.pt", "x")
    file = tmp_path / "redirector.safetensors"
    redirector("sd").save(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match="can't be read as a redirector"):
        Redirector.load(file)
