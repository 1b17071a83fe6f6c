"""What methods get at sites, and what becomes of what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight import Method, guard
from safelight.backbone import Backbone
from safelight.flow import Heads
from safelight.site import Site
from safelight.tap import _Interception
from safelight.testing import sample, tiny_pipeline

EDITED = {"sd": "middle.0:image", "sd3": "joint.1:image", "flux": "single.0.attention:image", "kontext": "joint.0:text"}
ATTENDED = {
    "sd": "middle.0.cross",
    "sd3": "joint.1.attention",
    "flux": "single.1.attention",
    "kontext": "joint.0.attention",
}
PROMPTS = ["a cat on a beach", "a dog in the snow"]


class Scale(Method):
    """Scales the tokens of some rows at a site."""

    def __init__(self, site: str, factor: float, rows: Iterable[int] = (0, 1)) -> None:
        self._site, self._factor, self._rows = site, factor, list(rows)

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        return (self._site,)

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        factors = torch.ones(len(tokens), 1, 1)
        factors[self._rows] = self._factor
        return tokens * factors

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        factors = torch.ones(len(heads.value), 1, 1, 1)
        factors[self._rows] = self._factor
        return attend(replace(heads, value=heads.value * factors))


@pytest.mark.parametrize("table", [EDITED, ATTENDED], ids=["edit", "attend"])
@pytest.mark.parametrize("name", EDITED)
def test_a_change_reaches_its_rows_only(name: str, table: dict[str, str]) -> None:
    pipe = tiny_pipeline(name)
    expected = sample(pipe, PROMPTS)
    with guard(pipe, Scale(table[name], 1.5, rows=[1])):
        images = sample(pipe, PROMPTS)
    assert torch.equal(images[0], expected[0])
    assert not torch.equal(images[1], expected[1])


@pytest.mark.parametrize("table", [EDITED, ATTENDED], ids=["edit", "attend"])
@pytest.mark.parametrize("name", EDITED)
def test_methods_share_a_site(name: str, table: dict[str, str]) -> None:
    pipe = tiny_pipeline(name)
    with guard(pipe, Scale(table[name], 2.0)):
        expected = sample(pipe, PROMPTS)
    with guard(pipe, Scale(table[name], 4.0), Scale(table[name], 0.5)):
        assert torch.allclose(sample(pipe, PROMPTS), expected, atol=1e-5)
    unguarded = sample(pipe, PROMPTS)
    with guard(pipe, Scale(table[name], 4.0), Scale(table[name], 0.25)):
        assert torch.allclose(sample(pipe, PROMPTS), unguarded, atol=1e-5)


def test_the_prompt_is_a_site(flux: Any) -> None:
    expected = sample(flux, PROMPTS)
    with guard(flux, Scale("prompt:text", 1.5)):
        assert not torch.equal(sample(flux, PROMPTS), expected)


def test_attention_masks_follow_the_conditional_rows() -> None:
    """The mask of a guided batch has a row for each of its rows; `attend` computes for the conditional ones alone."""
    query = torch.randn(4, 1, 3, 2)
    mask = torch.zeros(4, 1, 3, 3)
    mask[2:, ..., 0] = -torch.inf
    seen: list[Tensor] = []

    def handle(compute: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(compute(q[2:], k[2:], v[2:], None, [2, 3]))
        return compute(q, k, v, None, None)

    with _Interception(handle):
        whole = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert torch.allclose(seen[0], whole[2:])
