"""Refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from safelight import Method, guard
from safelight.flow import Embedding
from safelight.methods.block import Block
from safelight.testing import Containing, sample

PROMPTS = ["a cat on a beach", "a knife on a beach"]


class Listen(Method):
    """Notes which prompts reach the text encoder."""

    def __init__(self) -> None:
        self.heard: list[list[str]] = []

    def encode(self, prompts: list[str], encode: Callable[[list[str]], Embedding]) -> Embedding:
        self.heard.append(prompts)
        return encode(prompts)


def test_flagged_pictures_are_grey_and_others_are_not(pipe: Any, detector: Containing) -> None:
    expected = sample(pipe, PROMPTS, num_images_per_prompt=2)
    with guard(pipe, Block(detector=detector)):
        images = sample(pipe, PROMPTS, num_images_per_prompt=2)
    assert torch.equal(images[:2], expected[:2])
    assert (images[2:] == 0.5).all()


def test_nothing_unsafe_is_even_begun(pipe: Any, detector: Containing) -> None:
    listen = Listen()
    with guard(pipe, Block(detector=detector), listen):
        sample(pipe, PROMPTS)
    assert listen.heard == [["a cat on a beach", ""]]


def test_pil_images_are_refused_too(sd: Any, detector: Containing) -> None:
    with guard(sd, Block(detector=detector)):
        images: Any = sample(sd, PROMPTS, output_type="pil")
    assert len(images[0].getcolors(10**4)) > 1
    assert len(images[1].getcolors(10**4)) == 1
