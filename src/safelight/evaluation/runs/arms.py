"""The arms of a run: which guards are attached, as descriptions that any worker can build them from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...compose import WEIGHTS, build
from ...detector import Detector, Forced
from ...errors import ArtefactError
from ...method import Method
from .fingerprint import described, digest, digest_file


@dataclass(frozen=True)
class Arm:
    """Guards by name or bundle folder with their settings, as `safelight.compose.build` takes them, and what they came to."""

    guards: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """`guard.field=value` each."""
    bank: str | None = None
    """A bank's file, instead of the one that comes along."""
    forced: bool = False
    """Whether detectors flag everything."""
    methods: Sequence[Any] = ()
    """The methods with all of their settings, weights by their hash."""

    @classmethod
    def plan(
        cls, guards: Sequence[str], pipeline: str, settings: Sequence[str] = (), bank: Path | None = None, forced: bool = False
    ) -> Arm:  # fmt: skip
        """Describes guards by name.

        Raises:
            ValueError: for an unknown guard, field or value, or if a forced arm has no detector.
            ArtefactError: if weights are missing or were made for another pipeline.
        """
        arm = cls(tuple(guards), tuple(settings), None if bank is None else str(bank), forced)
        return replace(arm, methods=tuple(describe(arm._methods(pipeline))))

    @classmethod
    def of(cls, methods: Sequence[Method]) -> Arm:
        """Describes methods that exist already; they can't be built elsewhere."""
        return cls(methods=tuple(describe(methods)))

    @property
    def hash(self) -> str:
        """Of what is attached, however it was named."""
        return digest(self.methods)

    def build(self, pipeline: str) -> list[Method]:
        """The methods.

        Raises:
            ArtefactError: if they are no longer what was planned, or exist in the planning process only.
        """
        if self.methods and not self.guards:
            raise ArtefactError(
                "this manifest was planned in Python from guards without a name, so no other process can build them; plan it with `safelight plan`"
            )
        methods = self._methods(pipeline)
        if digest(describe(methods)) != self.hash:
            raise ArtefactError(
                f"the guard {' + '.join(self.guards)} is no longer what it was when the manifest was planned: a bundle, a bank or the "
                "package has changed; put it back, or plan again into another folder"
            )
        return methods

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary."""
        return {**vars(self), "guards": list(self.guards), "settings": list(self.settings), "methods": list(self.methods)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Arm:
        """The arm of a manifest's header."""
        return cls(**{**given, "guards": tuple(given["guards"]), "settings": tuple(given["settings"]), "methods": tuple(given["methods"])})

    def _methods(self, pipeline: str) -> list[Method]:
        methods = build(self.guards, pipeline, self.settings, None if self.bank is None else Path(self.bank))
        if not self.forced:
            return methods
        forced = forced_methods(methods)
        if forced is None:
            raise ValueError(f"{' + '.join(self.guards) or 'an arm without guards'} has no detector that could be forced")
        return forced


def describe(methods: Sequence[Method]) -> list[Any]:
    """Methods as JSON: all settings, weights by their hash."""
    return [{"method": method.name} | described(method) for method in methods]


def forced_methods(methods: Sequence[Method]) -> list[Method] | None:
    """The same methods with detectors that flag everything; None if they have none."""
    changed = [_forced(method) for method in methods]
    return changed if any(new is not old for new, old in zip(changed, methods, strict=True)) else None


def _forced(method: Method) -> Method:
    detector, inner = getattr(method, "detector", None), getattr(method, "method", None)
    if isinstance(inner, Method):
        method = replace(method, method=_forced(inner))  # type: ignore[type-var]
    return replace(method, detector=Forced(detector)) if isinstance(detector, Detector) else method  # type: ignore[type-var]


@cache
def pipeline_artefacts(name: str) -> Mapping[str, str]:
    """What a pipeline's images depend on: hashes of bundled weights; of a local folder, its configurations' and its weights' sizes."""
    if name.startswith("testbed/"):
        parts = {"sd": ("unet", "clip"), "sd3": ("sd3", "clip", "t5"), "flux": ("flux", "clip", "t5"), "kontext": ("flux", "clip", "t5")}
        files = [WEIGHTS / f"{part}.safetensors" for part in ("vae", *parts.get(name.removeprefix("testbed/"), ()))]
        return {file.name: digest_file(file) for file in files if file.is_file()}
    folder = Path(name)
    if not folder.is_dir():
        return {}
    found = {str(file.relative_to(folder)): digest_file(file) for file in sorted(folder.rglob("*.json"))}
    weights = (file for kind in ("*.safetensors", "*.bin") for file in sorted(folder.rglob(kind)))
    return found | {str(file.relative_to(folder)): f"{file.stat().st_size} bytes" for file in weights}
