"""Ways around the guard that a reviewer found, each closed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from safelight import Method, bundle, guard
from safelight.bank import Bank, Pair
from safelight.cli.artefacts import read_pairs
from safelight.detectors.neighbours import Neighbours
from safelight.errors import ArtefactError, UnsupportedPipeline
from safelight.flow import Call
from safelight.methods.block import Block
from safelight.methods.gate import Gate
from safelight.methods.negative_prompt import NegativePrompt
from safelight.site import Layout
from safelight.testing import Containing, sample, tiny_pipeline


def embed(texts: Any) -> torch.Tensor:
    return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(len(text))) for text in texts])


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.build(embed, [Pair("a knife", "a cup", "weapons")], ["a cat", "a house"])


@pytest.mark.parametrize("changes", [{"threshold": math.nan}, {"threshold": 7.0}, {"threshold": 1.0}, {"k": 0}, {"temperature": 0.0}])
def test_settings_that_switch_a_detector_off_are_refused(bank: Bank, changes: dict[str, Any]) -> None:
    detector = Neighbours(bank=bank, encoder=embed, **changes)
    pipe = tiny_pipeline("sd")
    for method in (Block(detector=detector), Gate(detector=Containing(), method=Block(detector=detector))):
        with pytest.raises(ValueError, match=next(iter(changes))):
            guard(pipe, method)


def test_a_score_that_cant_be_compared_is_flagged(bank: Bank) -> None:
    detector = Neighbours(bank=bank, encoder=embed, threshold=math.nan)
    assert detector.verdicts(["a knife"])[0].flagged


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
def test_words_beyond_the_first_encoders_limit_are_judged(name: str) -> None:
    pipe = tiny_pipeline(name)
    seen: list[str] = []

    class Reading(Containing):
        def __call__(self, items: Any) -> torch.Tensor:
            seen.extend(items)
            return super().__call__(items)

    with guard(pipe, Block(detector=Reading())) as handle:
        sample(pipe, "a cat on the beach " * 12 + "with a knife")
    assert handle.records[0].flagged
    limit = pipe.text_encoder.config.max_position_embeddings - 2
    pieces = [text for text in seen if len(text.split()) <= limit]
    assert any("knife" in text for text in pieces), "no piece that the encoder reads whole holds the last words"


def test_offloading_that_hooks_the_denoiser_anew_keeps_the_guard(pipe: Any) -> None:
    module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    add_hook_to_module(module, ModelHook())
    try:
        with guard(pipe, Block(detector=Containing())) as handle:

            def offload() -> None:  # what `enable_model_cpu_offload` makes of it
                remove_hook_from_module(module)
                add_hook_to_module(module, ModelHook())

            pipe.maybe_free_model_hooks = offload
            for _ in range(3):
                sample(pipe, "a knife on a beach")
                assert handle.records[0].flagged
    finally:
        remove_hook_from_module(module)
        del pipe.maybe_free_model_hooks


def test_skip_layer_guidance_works_under_an_idle_guard() -> None:
    pipe = tiny_pipeline("sd3")
    prompts = ["a cat on a beach", "a dog on a beach"]
    settings = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    base = sample(pipe, prompts, guided=True, **settings)
    with guard(pipe, Method()):
        assert torch.equal(torch.as_tensor(sample(pipe, prompts, guided=True, **settings)), torch.as_tensor(base))


def test_an_extra_branch_refuses_an_ip_adapter() -> None:
    call = Call(
        torch.zeros(2, 1), torch.zeros(2, 1, 1), torch.zeros(()), Layout(1, 1), slice(0, 2), (0, 1),
        rest={"added_cond_kwargs": {"image_embeds": [torch.zeros(2, 4)]}},
    )  # fmt: skip
    with pytest.raises(UnsupportedPipeline, match="IP-Adapter"):
        call.take([0])


@pytest.mark.parametrize("document", [[], {}, {"methods": [{"kind": "method"}]}, {"methods": ["block"]}])
def test_a_damaged_bundle_is_told(document: Any, tmp_path: Path) -> None:
    if isinstance(document, dict):
        document = {"format": bundle.FORMAT, **document}
    (tmp_path / "method.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=r"method\.json"):
        bundle.load(tmp_path)


def test_short_rows_and_broken_quotes_are_told(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("unsafe,safe,category\ngun,cup\n")
    with pytest.raises(ValueError, match=r"row 1 \(line 2\) has 2 fields and the header 3"):
        read_pairs(file)
    file.write_text('unsafe,safe,category\n"' + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match="is not a well-formed table"):
        read_pairs(file)


def test_an_unguided_negative_prompt_is_refused_at_the_first_step() -> None:
    pipe = tiny_pipeline("sd")
    with guard(pipe, NegativePrompt(words="a knife")), pytest.raises(ValueError, match="classifier-free guidance"):
        sample(pipe, "a cat", guided=False)
