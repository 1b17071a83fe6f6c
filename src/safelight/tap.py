"""Taps at sites: where the guard reaches into the denoiser, and proof that each was really passed."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .backbone import Backbone
from .errors import SafetyBypassed, UnsupportedPipeline
from .flow import Call, Heads, put
from .method import Method
from .site import Attention, Port, Site, Stream
from .wrapping import wrap


class Taps:
    """All taps of one guard. Each denoiser call must pass each of them exactly once."""

    def __init__(self, backbone: Backbone, stack: ExitStack) -> None:
        self._backbone, self._stack = backbone, stack
        self._sites: list[Site] = []
        self._methods: dict[Site, list[Callable[[], Method]]] = {}
        self._passed: Counter[int] = Counter()
        self._call: Call | None = None

    def add(self, address: Site | str, method: Callable[[], Method]) -> None:
        """Leads a site to a method's `edit` or `attend`; methods that share a site are called in the order in which they came."""
        site = Site.parse(address)
        if site in self._methods:
            self._methods[site].append(method)
            return
        module, entry = self._backbone.locate(site)
        tap = len(self._sites)
        if isinstance(entry, Port):
            self._tap_port(tap, site, module, entry)
        else:
            self._tap_attention(tap, site, module, entry)
        self._sites.append(site)
        self._methods[site] = [method]

    @contextmanager
    def watching(self, call: Call) -> Iterator[None]:
        """Around one call of the denoiser.

        Raises:
            SafetyBypassed: if a tap was not passed exactly once.
        """
        self._call, self._passed = call, Counter()
        try:
            yield
        finally:
            self._call = None
        for tap, site in enumerate(self._sites):
            if self._passed[tap] != 1:
                raise SafetyBypassed(
                    f"the site '{site}' was passed {self._passed[tap]} times in one denoiser call instead of once; is a block skipped or "
                    "cached, or an attention backend in use that bypasses PyTorch's scaled_dot_product_attention?"
                )

    def _pass(self, tap: int) -> Call:
        if self._call is None:
            raise SafetyBypassed("a block of the denoiser ran outside a guarded call; remove the guard first")
        self._passed[tap] += 1
        return self._call

    def _tap_port(self, tap: int, site: Site, module: nn.Module, port: Port) -> None:
        assert site.stream is not None
        stream: Stream = site.stream

        def edit(tensor: Tensor | None) -> Tensor | None:
            call = self._pass(tap)
            if tensor is None or not call.conditional:
                return tensor
            window = (call.cond, call.layout.span(stream, port.streams))
            tokens = tensor[window]
            edited = tokens
            for method in self._methods[site]:
                edited = method().edit(site, edited)
            return tensor if edited is tokens else put(tensor, window, edited)

        if port.side == "input":
            handle = module.register_forward_pre_hook(lambda _, args: _change(args, port.slot, edit))
        else:
            handle = module.register_forward_hook(lambda _, args, output: _change(output, port.slot, edit))
        self._stack.callback(handle.remove)

    def _tap_attention(self, tap: int, site: Site, module: nn.Module, entry: Attention) -> None:
        backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if backend is not None and "native" not in str(getattr(backend, "value", backend)):
            raise UnsupportedPipeline(f"the attention backend {backend!r} can't be guarded at '{site}'; use the native one")

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._wanted(site):
                self._pass(tap)
                return original(*args, **kwargs)
            with _Interception(lambda compute, q, k, v: self._attend(tap, site, entry, compute, q, k, v)):
                return original(*args, **kwargs)

        wrap(self._stack, module, "forward", around)

    def _wanted(self, site: Site) -> bool:
        """Whether any method has something to do at an attention; if none has, nothing is intercepted, which costs nothing."""
        return self._call is None or (self._call.conditional and any(method().attends for method in self._methods[site]))

    def _attend(
        self, tap: int, site: Site, entry: Attention, compute: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        call = self._pass(tap)
        if not call.conditional:
            return compute(query, key, value, None, None)
        heads = Heads(query[call.cond], key[call.cond], value[call.cond], self._spans(call, entry.queries), self._spans(call, entry.keys))
        whole: list[Tensor] = []

        def everything() -> Tensor:  # one fused call for all rows, bit-identical if the method leaves it alone; made if somebody asks
            if not whole:
                whole.append(compute(query, key, value, None, None))
                whole.append(whole[0][call.cond])
            return whole[1]

        def base(changed: Heads) -> Tensor:
            if changed is heads:
                return everything()
            rows = [call.cond.start + row for row in (range(len(heads.query)) if changed.rows is None else changed.rows)]
            return compute(changed.query, changed.key, changed.value, changed.bias, rows)

        chain: Callable[[Heads], Tensor] = base
        for method in reversed(self._methods[site]):
            chain = functools.partial(_attend_through, method(), site, chain)
        attended = chain(heads)
        if whole and attended is whole[1]:
            return whole[0]
        if call.cond == slice(0, len(query)):
            return attended
        everything()
        return put(whole[0], call.cond, attended)

    @staticmethod
    def _spans(call: Call, streams: tuple[Stream, ...]) -> dict[Stream, slice]:
        return {stream: call.layout.span(stream, streams) for stream in streams}


class _Interception(TorchFunctionMode):
    """Hands each scaled dot-product attention to `handle`: works with any processor, LoRA and IP-Adapter ones too."""

    def __init__(self, handle: Callable[..., Tensor]) -> None:
        super().__init__()
        self._handle = handle

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given.pop(name) for name in names[:3])
        mask = given.pop("attn_mask", None)

        def compute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: list[int] | None) -> Tensor:
            chosen = mask if mask is None or rows is None or mask.shape[0] == 1 else mask[rows]
            return function(q, k, v, attn_mask=_joined(chosen, bias, q), **given)

        return self._handle(compute, query, key, value)


def _joined(mask: Tensor | None, bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The pipeline's attention mask and a method's bias in one."""
    if bias is None or mask is None:
        return mask if bias is None else bias.to(query.dtype)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return mask + bias.to(query.dtype)


def _attend_through(method: Method, site: Site, following: Callable[[Heads], Tensor], heads: Heads) -> Tensor:
    return method.attend(site, heads, following)


def _change(values: Any, slot: int, edit: Callable[[Tensor | None], Tensor | None]) -> Any:
    if not isinstance(values, tuple):
        return edit(values)
    changed = edit(values[slot])
    return values if changed is values[slot] else (*values[:slot], changed, *values[slot + 1 :])


__all__ = ["Taps"]
