"""What a guard did to one image."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Action:
    """What one method did to one image. All fields are JSON-serialisable."""

    method: str
    flagged: bool = False
    concept: str | None = None
    score: float | None = None
    threshold: float | None = None
    action: str = "none"
    """In one word: none, blended, redirected, refused, …"""
    steps: tuple[int, int] | None = None
    """The first step it acted in, and the one after the last."""
    strength: float | None = None
    mask: list[list[int]] | None = None
    """The image tokens it acted on, as a grid of 0 and 1."""
    note: str | None = None


@dataclass
class Negative:
    """The negative prompt of one image, which steers it too."""

    prompt: str | None
    """None: it was given as an embedding."""
    flagged: bool = False
    """Whether a detector finds it unsafe. It is no fault of the image: whoever excludes knives names them."""
    concept: str | None = None
    score: float | None = None
    left_out: bool = False
    """Whether it was replaced by an empty one, so that it can't lead a flagged image back."""


@dataclass
class Record:
    """What was asked for one image, and what each method did about it, outermost first."""

    prompt: str | None
    actions: list[Action] = field(default_factory=list)
    negative: Negative | None = None
    read: list[str] = field(default_factory=list)
    """What text encoders read in the prompt beyond what was typed: pieces after a typed end marker, learned words, a pipeline's own additions."""
    unjudged: list[str] = field(default_factory=list)
    """The arguments with pictures that went into it, and that no method looked at."""

    @property
    def flagged(self) -> bool:
        """Whether any method found this request or image unsafe."""
        return any(action.flagged for action in self.actions)

    @property
    def decisive(self) -> Action | None:
        """The first method that flagged it, else the first of all."""
        return next((a for a in self.actions if a.flagged), self.actions[0] if self.actions else None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary."""
        return {
            "prompt": self.prompt,
            "flagged": self.flagged,
            "actions": [asdict(action) for action in self.actions],
            "negative": None if self.negative is None else asdict(self.negative),
            "read": self.read,
            "unjudged": self.unjudged,
        }
