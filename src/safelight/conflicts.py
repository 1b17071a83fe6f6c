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
    states = [vars(part) for part in module.modules()]
    if getattr(module, "is_cache_enabled", False) or any(_skips_blocks(state) for state in states):
        raise UnsupportedPipeline("a block cache skips blocks and with them the guard; call `disable_cache()` on the denoiser first")
    if any(state.get("_compiled_call_impl") is not None or "_orig_mod" in state["_modules"] for state in states):
        raise UnsupportedPipeline("the denoiser is compiled, and its activations are out of reach; attach the guard to the plain module")


def _skips_blocks(state: dict[str, Any]) -> bool:
    """Whether a diffusers hook may leave the module of this state out: caches can be applied without `enable_cache`."""
    hooks = getattr(state.get("_diffusers_hook"), "hooks", {})
    return any(word in name for name in hooks for word in ("cache", "fbc", "broadcast", "layer_skip"))


__all__ = ["check_denoiser"]
