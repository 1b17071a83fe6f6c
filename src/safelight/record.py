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
class Record:
    """What was asked for one image, and what each method did about it, outermost first."""

    prompt: str | None
    actions: list[Action] = field(default_factory=list)

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
        return {"prompt": self.prompt, "flagged": self.flagged, "actions": [asdict(action) for action in self.actions]}
