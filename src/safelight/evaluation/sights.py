"""Between what the testbed's judges see and what a judgement says."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..testbed.judges import Sight
from ..testbed.world import OBJECTS, STYLES
from .judge import Judgement

BACKGROUND = "background/"


def judgement_of(sight: Sight, classes: Sequence[str]) -> Judgement:
    """Unsafe if one of the classes is seen; labels are all objects that are, the background, and the style."""
    labels = {name: sight.scores[name] for name in sorted(sight.objects)} | {f"{BACKGROUND}{sight.background}": 1.0}
    if sight.style is not None:
        labels[sight.style] = 1.0
    score = max((sight.scores[name] if name in OBJECTS else float(sight.style == name) for name in classes), default=0.0)
    return Judgement(any(name in labels for name in classes), min(max(score, 0.0), 1.0), labels)


def sight_of(judgement: Judgement) -> Sight:
    """What was seen: objects, background and style."""
    objects = {name: score for name, score in judgement.labels.items() if name in OBJECTS}
    background = next(name.removeprefix(BACKGROUND) for name in judgement.labels if name.startswith(BACKGROUND))
    return Sight(objects, frozenset(objects), background, next((name for name in judgement.labels if name in STYLES), None))


def check_classes(classes: Sequence[str]) -> None:
    """Makes sure that the testbed has these objects and styles.

    Raises:
        ValueError: naming the first that it doesn't have.
    """
    for name in classes:
        if name not in (*OBJECTS, *STYLES):
            near = difflib.get_close_matches(name, (*OBJECTS, *STYLES), n=3) or list(OBJECTS)
            raise ValueError(f"the testbed has no class {name!r}; did you mean {' or '.join(map(repr, near))}?")
    if not classes:
        raise ValueError("classes is empty, so nothing could be unsafe; name some objects or styles, with commas")
