"""A second trajectory beside the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from safelight import Method, guard
from safelight.branch import Branch, copy_scheduler, own_randomness
from safelight.flow import Call, Step
from safelight.testing import sample

PROMPTS = ["a cat on a beach", "a dog in the snow", "a tree at night"]


class Aside(Method):
    """Follows two other prompts beside the main ones, and tells where they end."""

    def __init__(self) -> None:
        self.ends: list[Tensor] = []

    def begin(self) -> None:
        self.branch = Branch(self.run, self.run.encode(["a car", "a fish"]), [0, 2])

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        noise = denoise(call)
        self.branch.denoise(call, noise, denoise)
        return noise

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        self.ends.append(self.branch.advance(step))
        return advance(step)


def test_a_branch_ends_where_its_prompt_alone_would(pipe: Any) -> None:
    expected = sample(pipe, PROMPTS, output_type="latent")
    alone = sample(pipe, ["a car", PROMPTS[1], "a fish"], output_type="latent")
    aside = Aside()
    with guard(pipe, aside):
        for _ in range(2):  # a scheduler that was copied too early fails in the second generation
            aside.ends.clear()
            assert torch.equal(sample(pipe, PROMPTS, output_type="latent"), expected), "a branch disturbs the main trajectory"
    assert torch.allclose(aside.ends[-1][[0, 2]], alone[[0, 2]], atol=1e-3)


def test_a_copied_scheduler_is_not_guarded(sd: Any) -> None:
    with guard(sd, Method()):
        sd.scheduler.set_timesteps(3)
        clone = copy_scheduler(sd.scheduler)
    assert isinstance(clone, DDIMScheduler)
    assert "step" not in vars(clone)
    assert torch.equal(clone.timesteps, sd.scheduler.timesteps)
    clone.set_timesteps(5)
    assert len(sd.scheduler.timesteps) == 3


def test_generators_are_not_used_up() -> None:
    one, many = torch.Generator().manual_seed(1), [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    for given in (one, many):
        copies = own_randomness({"generator": given, "eta": 0.5})
        assert copies["eta"] == 0.5
        for generator, clone in zip(given if isinstance(given, list) else [given], _listed(copies["generator"]), strict=True):
            drawn = torch.randn(3, generator=clone)
            assert torch.equal(torch.randn(3, generator=generator), drawn)
    assert own_randomness({"generator": None}) == {"generator": None}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
