"""Addresses and layouts."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.site import Layout, Site, Stream

words = st.from_regex(r"[a-z]+", fullmatch=True)
streams = st.sampled_from(get_args(Stream))


@given(words, st.none() | st.integers(0, 10**6), st.none() | words, st.none() | streams)
def test_an_address_round_trips(block: str, index: int | None, part: str | None, stream: Stream | None) -> None:
    site = Site(block, index, part, stream)
    assert Site.parse(str(site)) == site
    assert Site.parse(site.kind) == Site(block, None, part, stream)


@pytest.mark.parametrize("address", ["", "joint.", "joint.3:sound", "Joint.3", "joint.3.attention.more.parts", ":image", "joint.-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"not a site.*single\.10\.attention:image"):
        Site.parse(address)


def test_a_site_is_its_own_address() -> None:
    site = Site("joint", 3)
    assert Site.parse(site) is site


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 50), st.permutations(get_args(Stream)), st.integers(1, 3))
def test_spans_partition_the_tokens(text: int, image: int, reference: int, order: list[Stream], count: int) -> None:
    layout, present = Layout(text, image, reference), tuple(order[:count])
    total = sum(getattr(layout, stream) for stream in present)
    covered = [index for stream in present for index in range(*layout.span(stream, present).indices(total))]
    assert covered == list(range(total))
