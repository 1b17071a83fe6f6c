"""What a backbone must keep to."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..attach import guard
from ..backbone import Backbone
from ..flow import Call, Heads
from ..method import Method
from ..site import Attention, Layout, Port, Site
from ..wrapping import ForeignWrapperWarning
from .state import assert_identical, assert_same_state, state_of
from .tiny import sample

PROMPTS = ("a cat on a beach", "a dog in the snow", "a tree in the desert", "a car at night")


def check_backbone(pipe: Any) -> None:
    """Checks the backbone of a pipeline that understands short prompts and makes small images (such as `tiny_pipeline`'s).

    Raises:
        AssertionError: if an idle guard changes an image or leaves something behind, if a site's address can't be read back, or
            if a port or attention is not passed exactly once per denoiser call, with the tokens that its `Layout` promises.
    """
    check_addresses(pipe)
    for guided in (True, False):
        check_idle(pipe, guided)
        check_sites(pipe, guided)
    check_foreign_wrapper(pipe)


def check_addresses(pipe: Any) -> None:
    """`Site.parse(str(site)) == site`, and every site can be located."""
    backbone = Backbone.of(pipe)
    for site in backbone.sites(*backbone.ports, *backbone.attentions):
        assert Site.parse(str(site)) == site, f"the address '{site}' is read as {Site.parse(str(site))}"
        assert isinstance(backbone.locate(site)[0], nn.Module), f"the site '{site}' is no module"
    for block in backbone.blocks:
        assert backbone.paths(block), f"this model has no '{block}' blocks: {backbone.blocks[block]} matches nothing"


def check_idle(pipe: Any, guided: bool) -> None:
    """A `Method()` that overrides nothing changes no bit, and is gone after `remove`."""
    cases: list[tuple[Any, dict[str, Any]]] = [
        (PROMPTS[0], {}),
        (list(PROMPTS), {}),
        (PROMPTS[0], {"num_images_per_prompt": 2}),
    ]
    expected = [sample(pipe, prompts, guided=guided, **changes) for prompts, changes in cases]
    before = state_of(pipe)
    with guard(pipe, Method(), unjudged_images="accept") as handle:
        for (prompts, changes), images in zip(cases, expected, strict=True):
            assert_identical(
                sample(pipe, prompts, guided=guided, **changes),
                images,
                f"an idle guard changes the images of {prompts!r}",
            )
            assert len(handle.records) == len(images), f"{len(handle.records)} records for {len(images)} images"
    assert_same_state(pipe, before, "after remove()")
    assert_identical(sample(pipe, PROMPTS[0], guided=guided), expected[0], "after remove(), images differ")


def check_sites(pipe: Any, guided: bool) -> None:
    """Every port and attention is passed once per call with the user's prompt, with the tokens that the layout promises."""
    backbone = Backbone.of(pipe)
    sites = tuple(backbone.sites(*backbone.ports, *backbone.attentions))
    expected = sample(pipe, list(PROMPTS[:2]), guided=guided)
    observer = _Observer(sites)
    with ExitStack() as stack:
        tokens = _watch_ports(backbone, sites, stack)
        stack.enter_context(guard(pipe, observer, unjudged_images="accept"))
        images = sample(pipe, list(PROMPTS[:2]), guided=guided)
    assert_identical(images, expected, "a method that looks at every site and changes none changes the image")
    assert observer.calls, "no denoiser call follows the user's prompt"
    for site in sites:
        _, entry = backbone.locate(site)
        found = tokens.get(site, 0)
        wanted = 0 if found is None else observer.calls
        assert observer.passed[site] == wanted, f"the site '{site}' was passed {observer.passed[site]} times in {wanted} denoiser calls"
        if isinstance(entry, Port) and found is not None:
            promised = sum(getattr(observer.layout, stream) for stream in entry.streams)
            # Where a tensor holds one stream only, it may be on a coarser grid, as inside a U-Net.
            fits = promised % found == 0 if entry.streams == ("image",) else found == promised
            assert fits, f"the tensor of '{site}' has {found} tokens, but the layout promises {promised} ({', '.join(entry.streams)})"


def check_foreign_wrapper(pipe: Any) -> None:
    """Who wraps the denoiser after the guard did keeps his wrapper, and is told."""
    module = Backbone.of(pipe).module
    handle, calls = guard(pipe, Method(), unjudged_images="accept"), 0
    inner = module.forward

    def foreign(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return inner(*args, **kwargs)

    module.forward = foreign
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            handle.remove()
        assert any(issubclass(w.category, ForeignWrapperWarning) for w in caught), "a foreign wrapper is not reported"
        assert module.forward is foreign, "a foreign wrapper was destroyed"
        sample(pipe, PROMPTS[0])
        assert calls, "the foreign wrapper is not called any more"
    finally:
        del module.forward


class _Observer(Method):
    """Counts and measures, and changes nothing."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = tuple(sites)
        self.passed: Counter[Site] = Counter()
        self._calls: list[Call] = []  # shared by the copies that live for one generation

    @property
    def calls(self) -> int:
        return len(self._calls)

    @property
    def layout(self) -> Layout:
        return self._calls[0].layout

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        return self._sites

    def denoise(self, call: Call, denoise: Any) -> Tensor:
        if call.conditional:
            self._calls.append(call)
            rows = call.cond.stop - call.cond.start
            assert rows == len(call.samples) == self.run.images, f"{rows} conditional rows for {self.run.images} images"
            height, width = call.layout.grid
            assert height * width == call.layout.image, f"a grid of {call.layout.grid} for {call.layout.image} image tokens"
        noise: Tensor = denoise(call)
        assert noise.shape == call.latents.shape, f"latents {tuple(call.latents.shape)}, but noise {tuple(noise.shape)}"
        return noise

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        self.passed[site] += 1
        assert len(tokens) == self.run.images, f"'{site}': {len(tokens)} rows for {self.run.images} images"
        return tokens

    def attend(self, site: Site, heads: Heads, attend: Any) -> Tensor:
        self.passed[site] += 1
        _, entry = self.run.backbone.locate(site)
        assert isinstance(entry, Attention)
        for tensor, spans in ((heads.query, heads.queries), (heads.key, heads.keys)):
            assert len(tensor) == self.run.images, f"'{site}': {len(tensor)} rows for {self.run.images} images"
            if len(spans) > 1:
                end = max(span.stop for span in spans.values())
                assert end == tensor.shape[2], f"'{site}': {tensor.shape[2]} tokens, but the layout promises {end}"
        attended: Tensor = attend(heads)
        return attended


def _watch_ports(backbone: Backbone, sites: Iterable[Site], stack: ExitStack) -> dict[Site, int | None]:
    """How many tokens the whole tensor of each port has; None where there is no tensor, as in SD3's last block."""
    tokens: dict[Site, int | None] = {}
    for site in sites:
        module, port = backbone.locate(site)
        if isinstance(port, Attention):
            continue

        def look(_: Any, *values: Any, site: Site = site, slot: int = port.slot) -> None:
            tensor = values[-1][slot] if isinstance(values[-1], tuple) else values[-1]
            tokens[site] = None if tensor is None else tensor.shape[1]

        register = module.register_forward_pre_hook if port.side == "input" else module.register_forward_hook
        stack.callback(register(look).remove)
    return tokens
