"""What is attached to a denoiser and gets in a guard's way."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import UnsupportedPipeline


def check_denoiser(module: nn.Module) -> None:
    """Makes sure that every block of a denoiser runs when it is called, where a guard can see it.

    Raises:
        UnsupportedPipeline: if a cache may skip blocks, or the denoiser is compiled.
    """
    for part in module.modules():  # in every generation: what is quickly told comes first
        state = vars(part)
        if state.get("_compiled_call_impl") is not None or "_orig_mod" in state["_modules"]:
            raise UnsupportedPipeline(
                "the denoiser is compiled, and its activations are out of reach; attach the guard to the plain module"
            )
        if "_diffusers_hook" in state and _skips_blocks(state["_diffusers_hook"]):
            raise _cached()
    if getattr(module, "is_cache_enabled", False):
        raise _cached()


def _skips_blocks(registry: Any) -> bool:
    """Whether a hook of diffusers may leave its module out: caches can be applied without `enable_cache`."""
    return any(word in name for name in registry.hooks for word in ("cache", "fbc", "broadcast", "layer_skip"))


def _cached() -> UnsupportedPipeline:
    return UnsupportedPipeline("a block cache skips blocks and with them the guard; call `disable_cache()` on the denoiser first")


__all__ = ["check_denoiser"]
