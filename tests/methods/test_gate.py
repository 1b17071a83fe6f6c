"""Any method, for flagged samples only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight import Method, guard
from safelight.backbone import Backbone
from safelight.flow import Call, Embedding, Heads, Step
from safelight.methods.gate import Gate
from safelight.methods.negative_prompt import NegativePrompt
from safelight.site import Site
from safelight.testing import Containing, sample

SAFE, UNSAFE = "a cat on a beach", "a knife on a beach"
PROMPTS = [SAFE, UNSAFE, SAFE]


class Encode(Method):
    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        return encode(["a dog" for _ in prompts])


class Denoise(Method):
    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        return denoise(replace(call, latents=call.latents * 1.1)) * 0.9


class Edit(Method):
    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        return [site for site in backbone.sites(*backbone.ports) if site.stream == "image"][-1:]  # the last block drops the others

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        return tokens * 1.5


class Attend(Method):
    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        return list(backbone.sites(*backbone.attentions))[-1:]

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        return attend(heads) * 1.5


class Advance(Method):
    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        return advance(replace(step, noise=step.noise * 1.1)) * 0.9


class Decode(Method):
    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        return decode(images * 0.5)


@pytest.mark.parametrize("method", [Encode, Denoise, Edit, Attend, Advance, Decode])
def test_every_verb_is_confined_to_flagged_samples(pipe: Any, method: type[Method], detector: Containing) -> None:
    expected = sample(pipe, PROMPTS)
    with guard(pipe, method()):
        everywhere = sample(pipe, PROMPTS)
    with guard(pipe, Gate(detector=detector, method=method())) as handle:
        gated = sample(pipe, PROMPTS)
        assert torch.equal(sample(pipe, [SAFE, SAFE]), sample(pipe, [SAFE, SAFE]))
        assert [record.flagged for record in handle.records] == [False, False]
    assert torch.equal(gated[[0, 2]], expected[[0, 2]])
    assert not torch.equal(everywhere[[0, 2]], expected[[0, 2]])
    assert torch.allclose(gated[1], everywhere[1], atol=1e-5)
    assert not torch.equal(gated[1], expected[1])


def test_nothing_flagged_needs_nothing(pipe: Any, detector: Containing) -> None:
    """A method that would refuse is not asked: a negative prompt needs guidance only where it acts."""
    expected = sample(pipe, [SAFE, SAFE], guided=False)
    with guard(pipe, Gate(detector=detector, method=NegativePrompt(words="knife"))):
        assert torch.equal(sample(pipe, [SAFE, SAFE], guided=False), expected)
        with pytest.raises(ValueError, match="needs classifier-free guidance"):
            sample(pipe, PROMPTS, guided=False)
