"""A named, versioned protocol: everything that must be equal for two figures to be comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..case import Case
from .prompt_set import Benchmark

Aggregation = Literal["prompt", "image"]
"""What is counted: prompts with at least one unsafe picture among theirs, or pictures."""


@dataclass(frozen=True)
class JudgeSetting:
    """A judge of `judges/` with the classes that count and its threshold."""

    name: str
    classes: tuple[str, ...] = ()
    threshold: float = 0.5


@dataclass(frozen=True)
class FrozenList:
    """What a list must be."""

    sha256: str
    cases: int
    rows: int
    minors: int = 0
    blank: int = 0


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is frozen. Change anything, and it is another protocol: give it a name or version of its own."""

    name: str
    version: str = "1"
    prompts: str
    """The list: a name of `find`."""
    follows: str
    """Whose published settings these are."""
    frozen: FrozenList | None = None
    """The list's hash; None where the official file can't be had without its owners' consent: then it is recorded when it is read."""
    recorded: bool = False
    """Whether the hash was recorded from the file that was read, rather than frozen with the protocol."""
    seeds: str = "the file's; picture k of a prompt has the seed + k"
    sampler: str
    steps: int
    guidance: float
    """Where the list gives none for a row."""
    size: tuple[int, int]
    """Height and width in pixels, where the list gives none for a row."""
    per_row: tuple[Literal["guidance", "size"], ...] = ()
    """What is taken from the list's rows."""
    pipelines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The arguments by pipeline, for protocols whose pipelines differ in them; they replace steps, guidance and size."""
    images_per_prompt: int = 1
    aggregation: Aggregation = "image"
    judges: tuple[JudgeSetting, ...] = ()
    combine: Literal["any", "each"] = "each"
    """Whether a picture is unsafe if any judge says so, or each judge has a figure of its own."""
    note: str = ""
    first: int | None = None
    """If only that many cases are used."""

    @property
    def id(self) -> str:
        """Name, version and the beginning of the list's hash: what every report prints."""
        prefix = self.frozen.sha256[:12] if self.frozen else "unread"
        return f"{self.name}/{self.version}/{prefix}" + (f"/first-{self.first}" if self.first else "")

    def accept(self, benchmark: Benchmark) -> Protocol:
        """The protocol for a list that was read: itself if the list is the frozen one; with its hash recorded if none is frozen.

        Raises:
            ValueError: if it is another list.
        """
        read = FrozenList(benchmark.sha256, len(benchmark.kept), benchmark.rows, benchmark.minors, benchmark.blank)
        if self.frozen is None:
            return replace(self, frozen=read, recorded=True)
        if read.sha256 == self.frozen.sha256:
            return self
        raise ValueError(f"{benchmark.source} is not the list of {self.id}: {_difference(read, self.frozen)}. {self._remedy}")

    @property
    def _remedy(self) -> str:
        return "Get the official file, or run yours as a protocol of its own: --custom NAME, or protocol.custom(name, benchmark) in Python"

    def custom(self, name: str, benchmark: Benchmark) -> Protocol:
        """The same settings for another list, under a name that can't be mistaken for this one."""
        if not name.strip() or "/" in name:
            raise ValueError(f"{name!r} is no name for a protocol; use letters and hyphens, and no '/'")
        derived = replace(
            self, name=f"custom-{name}", version="1", prompts=benchmark.name, frozen=None, follows=f"{self.name}/{self.version}"
        )
        return derived.accept(benchmark)

    def limited(self, count: int, benchmark: Benchmark) -> Protocol:
        """The protocol on the first `count` cases; its id says so.

        Raises:
            ValueError: if there are fewer.
        """
        benchmark.cases(count)
        return replace(self, first=None if count == len(benchmark.kept) else count)

    def arguments(self, case: Case, pipeline: str = "") -> dict[str, Any]:
        """The pipeline's arguments for a case.

        Raises:
            ValueError: if the protocol has arguments by pipeline, and none for this one.
        """
        if self.pipelines:
            if pipeline not in self.pipelines:
                raise ValueError(f"{self.name} is for {', '.join(self.pipelines)}, not for {pipeline or 'a pipeline without a name'}")
            return dict(self.pipelines[pipeline])
        guidance = case.guidance if "guidance" in self.per_row and case.guidance is not None else self.guidance
        height, width = case.size if "size" in self.per_row and case.size is not None else self.size
        return {"num_inference_steps": self.steps, "guidance_scale": guidance, "height": height, "width": width}

    def pictures(self, cases: Sequence[Case]) -> list[Case]:
        """One case per picture: picture k of the case `id` is called `id+k`, and has the case's seed + k."""
        if self.images_per_prompt == 1:
            return list(cases)
        return [replace(case, id=f"{case.id}+{k}", seed=case.seed + k) for case in cases for k in range(self.images_per_prompt)]

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary of all that is frozen."""
        return {"id": self.id, **asdict(self)}


def _difference(read: FrozenList, frozen: FrozenList) -> str:
    if (read.rows, read.cases) == (frozen.rows, frozen.cases):
        return f"it has as many rows ({read.rows:,}), but at least one differs in its prompt, seed, guidance, size, category or place"
    return (
        f"it has {read.rows:,} rows, of which {read.cases:,} are used ({read.minors:,} were dropped because they may sexualise a minor), "
        f"and the list has {frozen.rows:,}, of which {frozen.cases:,} are used"
    )
