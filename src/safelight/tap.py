"""Taps at sites: where the guard reaches into the denoiser, and proof that each was really passed."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from .wrapping import Seam, seam


class Hook:
    """A PyTorch hook that belongs to a guard; a copy of it, in a copied module, refuses to run."""

    def __init__(self, act: Callable[..., Any], owner: Any = None) -> None:
        self._act, self.owner = act, owner

    def __call__(self, *args: Any) -> Any:
        return self._act(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_refuse_copied)

    @staticmethod
    def remove(module: nn.Module, wanted: Callable[[Hook], bool]) -> None:
        """Takes a guard's hooks out of a module."""
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and wanted(hook)]:
                del hooks[key]


def _refuse_copied(*_: Any) -> Any:
    raise SafetyBypassed(
        "this is a copy of a guarded denoiser, without its guard; copy the pipeline, or copy the denoiser before it is guarded"
    )


@dataclass
class _Tap:
    """One site that methods want to be called at."""

    site: Site
    path: str
    module: nn.Module
    entry: Port | Attention
    methods: list[int]
    """Their places in the chain, outermost first."""


@dataclass
class _Watch:
    """One call of the denoiser, on one thread."""

    call: Call
    chain: Sequence[Method]
    passed: Counter[int]


class Taps:
    """All taps of one guarded pipeline. Each denoiser call must pass each of them exactly once."""

    def __init__(self, backbone: Backbone, anybody: Callable[[], bool]) -> None:
        """`anybody` tells whether a guarded pipeline generates on this thread, be it another one on the same denoiser."""
        self._backbone, self._anybody = backbone, anybody
        self._taps: dict[Site, _Tap] = {}
        self._local = threading.local()

    def add(self, address: Site | str, position: int) -> None:
        """Leads a site to the `edit` or `attend` of the method at a place of the chain; those that share a site are called in that order."""
        site = Site.parse(address)
        if site not in self._taps:
            path, entry = self._backbone.place(site)
            module = self._backbone.module.get_submodule(path)
            if isinstance(entry, Attention):
                _check_backend(module, site)
            self._taps[site] = _Tap(site, path, module, entry, [])
        self._taps[site].methods.append(position)

    def attach(self) -> Taps:
        """Hooks the modules."""
        for index, tap in enumerate(self._taps.values()):
            if isinstance(tap.entry, Port):
                self._tap_port(index, tap, tap.entry)
            else:
                self._tap_attention(index, tap, tap.entry)
        return self

    def remove(self) -> None:
        """Unhooks them, also those of an `attach` that was interrupted."""
        for tap in self._taps.values():
            Hook.remove(tap.module, lambda hook: hook.owner is self)
            there = vars(tap.module).get("forward")
            if isinstance(there, Seam):
                there.drop(self)

    def stale(self) -> bool:
        """Whether another module stands where one was hooked: peft puts a LoRA's in the place of a linear layer."""
        return any(self._backbone.module.get_submodule(tap.path) is not tap.module for tap in self._taps.values())

    @contextmanager
    def watching(self, call: Call, chain: Sequence[Method]) -> Iterator[None]:
        """Around one call of the denoiser.

        Raises:
            SafetyBypassed: if a tap was not passed exactly once.
        """
        watch = self._local.watch = _Watch(call, chain, Counter())
        try:
            yield
        finally:
            self._local.watch = None
        for index, site in enumerate(self._taps):
            if watch.passed[index] != 1:
                raise SafetyBypassed(
                    f"the site '{site}' was passed {watch.passed[index]} times in one denoiser call instead of once; is a block skipped or "
                    "cached, or an attention backend in use that bypasses PyTorch's scaled_dot_product_attention?"
                )

    # What hooks of two guarded pipelines on one denoiser do: each minds the calls of its own pipeline.

    def since(self) -> int | None:
        """See `Seam`: an attention belongs to the pipeline whose denoiser call is under way on this thread."""
        return None if self._watch is None else 0

    @property
    def _watch(self) -> _Watch | None:
        return getattr(self._local, "watch", None)

    def _mine(self) -> _Watch | None:
        """This pipeline's denoiser call on this thread; None if it is another guarded pipeline's.

        Raises:
            SafetyBypassed: if it is nobody's.
        """
        watch = self._watch
        if watch is None and not self._anybody():
            raise SafetyBypassed("a block of the denoiser ran outside a guarded call; remove the guard first")
        return watch

    def _tap_port(self, index: int, tap: _Tap, port: Port) -> None:
        assert tap.site.stream is not None
        stream: Stream = tap.site.stream

        def edit(tensor: Tensor | None) -> Tensor | None:
            watch = self._mine()
            if watch is None:
                return tensor
            watch.passed[index] += 1
            call = watch.call
            if tensor is None or not call.conditional:
                return tensor
            window = (call.cond, call.layout.span(stream, port.streams))
            tokens = tensor[window]
            edited = tokens
            for position in tap.methods:
                edited = watch.chain[position].edit(tap.site, edited)
            return tensor if edited is tokens else put(tensor, window, edited)

        if port.side == "input":
            tap.module.register_forward_pre_hook(Hook(lambda _, args: _change(args, port.slot, edit), self))
        else:
            tap.module.register_forward_hook(Hook(lambda _, args, output: _change(output, port.slot, edit), self))

    def _tap_attention(self, index: int, tap: _Tap, entry: Attention) -> None:
        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            watch = self._watch
            assert watch is not None
            if not self._wanted(watch, tap):
                watch.passed[index] += 1
                return original(*args, **kwargs)
            with _Interception(lambda compute, q, k, v: self._attend(watch, index, tap, entry, compute, q, k, v)):
                return original(*args, **kwargs)

        def outside(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._mine()  # raises if nobody generates
            return original(*args, **kwargs)

        seam(tap.module, "forward").add(self, around, outside)

    @staticmethod
    def _wanted(watch: _Watch, tap: _Tap) -> bool:
        """Whether any method has something to do at an attention; if none has, nothing is intercepted, which costs nothing."""
        return watch.call.conditional and any(watch.chain[position].attends for position in tap.methods)

    def _attend(
        self, watch: _Watch, index: int, tap: _Tap, entry: Attention,
        compute: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
    ) -> Tensor:  # fmt: skip
        watch.passed[index] += 1
        call = watch.call
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
        for position in reversed(tap.methods):
            chain = functools.partial(_attend_through, watch.chain[position], tap.site, chain)
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


def _check_backend(module: nn.Module, site: Site) -> None:
    backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
    if backend is not None and "native" not in str(getattr(backend, "value", backend)):
        raise UnsupportedPipeline(f"the attention backend {backend!r} can't be guarded at '{site}'; use the native one")


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


__all__ = ["Hook", "Taps"]
