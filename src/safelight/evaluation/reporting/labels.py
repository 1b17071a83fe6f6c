"""How figures are called on a page, which way is better, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..case import Estimate

Group = Literal["Safety", "Fidelity", "Cost"]


@dataclass(frozen=True)
class Label:
    """A figure for people."""

    title: str
    group: Group
    better: Literal["more", "less", ""]
    meaning: str
    share: bool = True
    """Whether it is a share, drawn on an axis from 0 to 1 and written in per cent."""


LABELS = {
    "unsafe_rate_base": Label("unsafe rate, unguarded", "Safety", "", "unsafe prompts whose unguarded picture is unsafe"),
    "unsafe_rate": Label("unsafe rate, guarded", "Safety", "less", "unsafe prompts whose guarded picture is unsafe"),
    "erase_rate": Label("erase rate", "Safety", "more", "of the unguarded pictures that are unsafe, the share that the guard makes safe"),
    "fsr": Label("FSR", "Safety", "more", "guarded pictures in which the concept is not seen, averaged over judges"),
    "sadi": Label("SaDi", "Safety", "more", "1 less the mean of unsafe rate and ΔP"),
    "sadi_s": Label("S of SaDi", "Safety", "less", "the unsafe rate, as SaDi counts it"),
    "retention": Label(
        "retention", "Fidelity", "more", "harmless things named by unsafe prompts, and drawn unguarded, that are still there"
    ),
    "untouched": Label("untouched", "Fidelity", "more", "harmless prompts whose picture is bit-identical"),
    "alignment_base": Label("alignment, unguarded", "Fidelity", "", "how sure a judge is of what harmless prompts name"),
    "alignment": Label("alignment, guarded", "Fidelity", "more", "how sure a judge is of what harmless prompts name"),
    "sadi_delta_p": Label("ΔP", "Fidelity", "less", "how far pictures of neighbouring harmless prompts move, 1 - cos of features"),
    "sadi_delta_p_forced": Label("ΔP, forced", "Fidelity", "less", "the same with the detector flagging everything"),
    "frechet": Label("Fréchet distance", "Fidelity", "less", "of guarded from unguarded pictures of harmless prompts", share=False),
    "over_refusal": Label("over-refusal", "Cost", "less", "harmless prompts that were flagged"),
    "overhead_benign": Label("overhead, harmless", "Cost", "less", "guarded over unguarded seconds, on harmless prompts", share=False),
    "overhead_unsafe": Label("overhead, unsafe", "Cost", "less", "guarded over unguarded seconds, on unsafe prompts", share=False),
    "overhead": Label("overhead", "Cost", "less", "guarded over unguarded seconds", share=False),
    "asr": Label("attack success", "Safety", "less", "prompts whose guarded picture is unsafe to all judges"),
    "asr_classifier": Label("attack success, classifier", "Safety", "less", "by the trained judge"),
    "asr_matcher": Label("attack success, matcher", "Safety", "less", "by the template matcher"),
}


def label(name: str) -> Label:
    """The label of a figure; one that isn't known keeps its name, and gets no direction."""
    return LABELS.get(name, Label(name.replace("_", " "), "Fidelity", "", "", share=False))


def written(estimate: Estimate, share: bool = True) -> str:
    """A figure's value in words: per cent, or a number of three digits."""
    return number(estimate.value, share)


def interval(estimate: Estimate, share: bool = True) -> str:
    """A figure's interval in words."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return "no interval"
    return f"{number(estimate.low, share).removesuffix(' %')} to {number(estimate.high, share)}"


def number(value: float, share: bool) -> str:
    """A value in words; what is not a number is undefined."""
    if math.isnan(value):
        return "undefined"
    if share:
        return f"{_unsigned(100 * value, 1)} %"
    return _unsigned(value, 2) if abs(value) < 100 else f"{value:,.0f}"


def _unsigned(value: float, digits: int) -> str:
    """Without the minus of a rounded zero, and without zeros that say nothing."""
    text = f"{value:.{digits}f}"
    text = text[1:] if text.startswith("-") and not text.strip("-0.") else text
    return text.rstrip("0").rstrip(".") if "." in text else text
