"""One call of a guarded pipeline, on one thread, and what its guards can vouch for."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from .errors import SafetyBypassed
from .method import Method
from .provenance import Provenance
from .record import Record
from .run import Run


class Handle(Protocol):
    """What an attachment is for its engine."""

    @property
    def methods(self) -> tuple[Method, ...]: ...

    @property
    def unjudged_images(self) -> str: ...

    def attach_to(self, pipe: Any) -> Any: ...

    def began(self, run: Run | None) -> None: ...

    def ended(self, records: list[Record]) -> None: ...


@dataclass(eq=False)
class Generation:
    """A call of the pipeline on one thread: it is alive while that call is on the thread's stack, and at no other time."""

    guards: list[Handle]
    """Innermost first."""
    chain: list[Method]
    """Copies of all their methods, outermost first, which live as long as the generation."""
    arguments: dict[str, Any]
    """Of the pipeline's call, by name."""
    frame: FrameType | None
    unjudged: list[str]
    """Those of them that hold pictures which no method looks at."""
    provenance: Provenance = field(default_factory=Provenance)
    started: int = field(default_factory=time.perf_counter_ns)
    run: Run | None = None
    encoding: bool = False
    turn: int = 0
    """Denoiser calls since the last step."""
    followed: int = 0
    """How many of them followed the prompt."""
    images: list[Any] = field(default_factory=list)
    """What the image processor made, as it left the guard."""
    revoked: bool = False

    @property
    def alive(self) -> bool:
        """Whether it runs on the calling thread."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False

    def check(self, who: str) -> Run:
        """The state of the generation, for a part of the pipeline that is called in it.

        Raises:
            SafetyBypassed: if no prompt was encoded yet, or a guard was removed.
        """
        if self.run is None:
            raise outside(who)
        if self.revoked:
            raise SafetyBypassed("a guard was removed while the pipeline was generating; the images are withheld")
        return self.run

    def fold(self, verb: str, base: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A function of the pipeline with the methods' verb around it."""
        for method in reversed(self.chain):
            base = functools.partial(_swapped, getattr(method, verb), base)
        return base

    def overrides(self, verb: str) -> bool:
        """Whether any method has a verb of its own."""
        return any(getattr(type(method), verb) is not getattr(Method, verb) for method in self.chain)

    def finish(self, output: Any) -> list[Record]:
        """One record per image, once all that was promised is found to have happened; each guard gets those of its own methods.

        Raises:
            SafetyBypassed: if anything is missing.
        """
        if self.run is None:
            raise SafetyBypassed("the pipeline ended without encoding a prompt through the guard; the images are withheld")
        run = self.check("the pipeline")
        if run.index == 0 or run.index < run.total:
            raise SafetyBypassed(
                f"the guard saw {run.index} of {run.total} steps; the images are withheld (was the generation interrupted, or the "
                "scheduler replaced?)"
            )
        self.provenance.settle()
        if self.overrides("decode"):
            self._check_examined(output)
        for position, method in enumerate(self.chain):
            run.check_acted(position, method.name, method.owed())
        position = len(self.chain)
        for guard in self.guards:
            position -= len(guard.methods)
            guard.ended(run.records(range(position, position + len(guard.methods))))
        return run.records(range(len(self.chain)))

    def _check_examined(self, output: Any) -> None:
        """Raises unless the images that leave are the latest ones that the guard examined."""
        if not self.images:
            raise SafetyBypassed("a guard examines or changes images, but none were decoded; use another output_type")
        latest = self.images[-1]
        leaving = output if output is latest else output[0] if isinstance(output, (tuple, list)) else getattr(output, "images", output)
        if leaving is not latest and not (isinstance(leaving, list) and isinstance(latest, list) and _same(leaving, latest)):
            raise SafetyBypassed("the pipeline returned other images than those that a guard examined; the images are withheld")


def outside(who: str) -> SafetyBypassed:
    """The error of a part that is used past the pipeline."""
    return SafetyBypassed(f"{who} was called outside a guarded generation; call the pipeline, or remove the guard")


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _swapped(verb: Callable[..., Any], following: Callable[[Any], Any], flowing: Any) -> Any:
    return verb(flowing, following)


__all__ = ["Generation", "Handle", "outside"]
