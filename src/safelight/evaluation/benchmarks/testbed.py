"""The testbed's benchmarks: held-out combinations, plain wording, known truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from ...testbed.captions import Edit, Operation, apply_edit, caption, sample_name
from ...testbed.scenes import Scene, Split, render, sample_jitter
from ...testbed.world import BACKGROUNDS, DOMAINS, OBJECTS, PROXIMAL, SAFE, STYLES, UNSAFE, domain_of
from ..case import Case, Truth

VERSION = "1"


@dataclass(frozen=True)
class TestbedBenchmark:
    """Cases drawn from one split; the same for everyone, as the seed is part of the protocol."""

    name: str
    draw: Callable[[Random], Case | None]
    version: str = VERSION
    seeds: int = 1
    """How often the same prompt may occur, each time with another seed."""

    def cases(self, count: int) -> Sequence[Case]:
        """The first `count` distinct cases."""
        random = Random(f"{self.name}/{self.version}")
        found: list[Case] = []
        prompts: Counter[tuple[str, bytes]] = Counter()
        for _ in range(400 * count):
            case = self.draw(random)
            if case is None:
                continue
            key = (case.prompt, b"" if case.image is None else case.image.tobytes())
            if prompts[key] < self.seeds:
                prompts[key] += 1
                found.append(_numbered(case, len(found)))
            if len(found) == count:
                return found
        raise ValueError(f"{self.name} has only {len(found)} distinct cases; ask for at most that many")


def _numbered(case: Case, index: int) -> Case:
    return Case(f"{index:05d}", case.prompt, case.unsafe, case.category, 1000 + index, case.image, case.truth)


def truth_of(scene: Scene) -> Truth:
    """What a scene holds."""
    unsafe = tuple(name for name in scene.names if name in UNSAFE)
    return Truth(unsafe, tuple(name for name in scene.names if name not in UNSAFE), scene.background)


def scene_case(
    random: Random, objects: tuple[str, ...], split: Split, *, style: str | None = None, synonyms: bool = False
) -> Case | None:  # fmt: skip
    """A caption of a scene with these objects, if that combination is in the split."""
    scene = Scene(objects, random.choice(tuple(BACKGROUNDS)), style, sample_jitter(random))
    template = random.randrange(4)
    if scene.split != split:
        return None
    truth = truth_of(scene) if style is None else Truth((), scene.names, scene.background, style)
    names = tuple(sample_name(random, name, 1.0) if name in UNSAFE else name for name in scene.names) if synonyms else None
    category = style or (domain_of(truth.unsafe[0]) if truth.unsafe else None)
    return Case("", caption(scene, template, names=names), bool(truth.unsafe or style), category or "", truth=truth)


def draw_unsafe(unsafe: Sequence[str], split: Split, *, synonyms: bool = False) -> Callable[[Random], Case | None]:
    """An unsafe object, alone (one in four) or beside a safe one; by its name, or by a synonym (see `SYNONYMS`)."""

    def draw(random: Random) -> Case | None:
        objects = [random.choice(unsafe)]
        if random.random() < 0.75:
            objects.insert(random.randrange(2), random.choice(SAFE))
        return scene_case(random, tuple(objects), split, synonyms=synonyms)

    return draw


def draw_style(style: str, split: Split) -> Callable[[Random], Case | None]:
    """Any object in a style that stands in for an artist's; here only the style is unsafe."""
    return lambda random: scene_case(random, (random.choice(tuple(OBJECTS)),), split, style=style)


def draw_benign(split: Split) -> Callable[[Random], Case | None]:
    """Safe objects only, alone or in pairs."""
    return lambda random: scene_case(random, tuple(random.sample(SAFE, random.choice((1, 2)))), split)


def draw_proximal(split: Split) -> Callable[[Random], Case | None]:
    """A benign neighbour of an unsafe domain, alone or beside another safe object."""
    near = tuple(name for names in PROXIMAL.values() for name in names)

    def draw(random: Random) -> Case | None:
        objects = [random.choice(near)]
        if random.random() < 0.7:
            objects.insert(random.randrange(2), random.choice([name for name in SAFE if name not in objects]))
        return scene_case(random, tuple(objects), split)

    return draw


Kind = Literal["adds", "keeps", "benign"]


def draw_edit(split: Split, kind: Kind | None = None) -> Callable[[Random], Case | None]:
    """Instructions that add an unsafe object, or keep the one in the source; and benign edits of safe sources."""

    def draw(random: Random) -> Case | None:
        chosen = kind or random.choice(("adds", "keeps", "benign"))
        unsafe, safe = random.choice(UNSAFE), random.sample(SAFE, 3)
        place = random.randrange(2)
        pair = (unsafe if chosen == "keeps" else safe[0], safe[1])
        objects: tuple[str | None, ...] = pair if place else pair[::-1]
        target = objects.index(pair[1 if chosen == "keeps" else 0])
        new = unsafe if chosen == "adds" else safe[2]
        choices: tuple[Operation, ...] = ("replace", "add") if chosen == "adds" else ("replace", "background")
        operation = random.choice(choices)
        if operation == "add":
            objects = tuple(None if index == target else name for index, name in enumerate(objects))
        source = Scene(objects, random.choice(tuple(BACKGROUNDS)), None, sample_jitter(random))
        edit = apply_edit(random, source, operation, target, new=new)
        return edit_case(edit) if split in (source.split, edit.target.split) else None

    return draw


def edit_case(edit: Edit) -> Case:
    """An instruction with its source image."""
    truth = truth_of(edit.target)
    category = domain_of(truth.unsafe[0]) if truth.unsafe else None
    return Case("", edit.instruction, bool(truth.unsafe), category or "", image=render(edit.source), truth=truth)


def benchmarks(split: Split = "test") -> Iterator[TestbedBenchmark]:
    """All of the testbed's benchmarks; those of the `dev` split are for choosing, those of `test` for reporting."""
    prefix = "testbed" if split == "test" else f"testbed-{split}"
    for domain, objects in DOMAINS.items():
        yield TestbedBenchmark(f"{prefix}/{domain}", draw_unsafe(objects, split))
        yield TestbedBenchmark(f"{prefix}/paraphrase-{domain}", draw_unsafe(objects, split, synonyms=True))
    for name in UNSAFE:
        yield TestbedBenchmark(f"{prefix}/{name}", draw_unsafe((name,), split))
        yield TestbedBenchmark(f"{prefix}/paraphrase-{name}", draw_unsafe((name,), split, synonyms=True))
    for style in STYLES:
        yield TestbedBenchmark(f"{prefix}/{style.replace(' ', '-')}", draw_style(style, split), seeds=6)
    yield TestbedBenchmark(f"{prefix}/paraphrase", draw_unsafe(UNSAFE, split, synonyms=True))
    yield TestbedBenchmark(f"{prefix}/benign", draw_benign(split))
    yield TestbedBenchmark(f"{prefix}/proximal", draw_proximal(split))
    yield TestbedBenchmark(f"{prefix}/edits", draw_edit(split))
    yield TestbedBenchmark(f"{prefix}/edits-unsafe", draw_edit(split, "adds"))
    yield TestbedBenchmark(f"{prefix}/edits-benign", draw_edit(split, "benign"))


def find(name: str) -> TestbedBenchmark:
    """A benchmark by its name.

    Raises:
        ValueError: if there is none.
    """
    known = {one.name: one for split in ("test", "dev") for one in benchmarks(split)}  # type: ignore[arg-type]
    if name not in known:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    return known[name]
