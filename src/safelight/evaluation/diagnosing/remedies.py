"""Which settings of which method help against what."""

from __future__ import annotations

from collections.abc import Sequence

SETTINGS = {
    "weaken": {
        "dual_latent": "For dual_latent lower `safe_weight` or raise `until`, and let `guidance` follow the prompt (arithmetic).",
        "saferedir": "For saferedir lower `alpha_scale`, keep `masked` and `adaptive` on, and raise `cooldown`.",
        "uvr": "For uvr raise `threshold`, lower `until`, `cover` and `noise`, or set `text` above 0.",
        "safedig": "For safedig lower `beta` and `gamma`, or narrow the steps between `after` and `until`.",
        "sld": "For sld choose a weaker preset, or lower `scale` and raise `warmup`.",
        "block": "block withholds pictures by design: put a method that leads elsewhere in its place.",
        "post_filter": "post_filter withholds pictures by design: put a method that leads elsewhere before it.",
    },
    "strengthen": {
        "dual_latent": "For dual_latent raise `safe_weight` or lower `until`.",
        "saferedir": "For saferedir raise `alpha_scale`, and lower `threshold`, `interval` and `cooldown`.",
        "uvr": "For uvr lower `threshold`, raise `until`, and set `text` to 0.",
        "safedig": "For safedig raise `beta` and `gamma`, or widen the steps between `after` and `until`.",
        "sld": "For sld choose a stronger preset, or raise `scale` and lower `warmup`.",
    },
    "detect": {
        "uvr": "For uvr that is `threshold`.",
        "safedig": "For safedig that is `threshold`, and `watch` for how long it looks.",
        "saferedir": "For saferedir that is `threshold`, and `interval` for how often it looks.",
    },
}
"""What to set, method by method."""


def settings(knob: str | None, methods: Sequence[str]) -> list[str]:
    """What to set, for the methods of a guard."""
    table = SETTINGS.get(knob or "", {})
    return [table[method] for method in methods if method in table]
