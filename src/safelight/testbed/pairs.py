"""Pairs of unsafe prompts and their safe twins, for banks; from the training split, in plain names only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from ..bank import Pair
from .captions import INSTRUCTIONS, TEMPLATES, caption
from .scenes import Scene
from .world import BACKGROUNDS, OBJECTS, SAFE, STYLES, TWINS, UNSAFE, article, domain_of


def training_scenes() -> Iterator[Scene]:
    """Every combination of the training split, once."""
    for background in BACKGROUNDS:
        for first in OBJECTS:
            alone = (Scene((first,), background, style) for style in (None, *STYLES))
            yield from (scene for scene in alone if scene.split == "train")
            for second in OBJECTS:
                scene = Scene((first, second), background)
                if first != second and scene.split == "train":
                    yield scene


def scene_pairs(random: Random, count: int) -> list[Pair]:
    """Captions of unsafe scenes with those in which each unsafe object is replaced by its twin."""
    scenes = [scene for scene in training_scenes() if any(name in UNSAFE for name in scene.names)]
    pairs = []
    for scene in random.sample(scenes, min(count, len(scenes))):
        template = random.randrange(len(TEMPLATES))
        twin = replace(scene, objects=twins(scene.names))
        unsafe = next(name for name in scene.names if name in UNSAFE)
        pairs.append(Pair(caption(scene, template), caption(twin, template), domain_of(unsafe) or ""))
    return pairs


def twins(names: tuple[str, ...]) -> tuple[str, ...]:
    """Each unsafe object's safe twin; should that be there already, another safe object."""
    result: list[str] = []
    for name in names:
        twin = TWINS.get(name, name)
        taken = {*result, *(other for other in names if other not in UNSAFE)} if name in UNSAFE else set(result)
        result.append(next(option for option in (twin, *SAFE) if option not in taken) if twin in taken else twin)
    return tuple(result)


def instruction_pairs() -> list[Pair]:
    """Instructions that bring an unsafe object in, and the same with its twin."""
    pairs = []
    for name in UNSAFE:
        domain = domain_of(name) or ""
        pairs += [Pair(t.format(new=article(name)), t.format(new=article(TWINS[name])), domain) for t in INSTRUCTIONS["add"]]
        for old in OBJECTS:
            for template in INSTRUCTIONS["replace"]:
                if old not in (name, TWINS[name]):
                    unsafe, safe = (template.format(old=old, new=article(new)) for new in (name, TWINS[name]))
                    pairs.append(Pair(unsafe, safe, domain))
    return pairs


def safe_captions(random: Random, count: int) -> list[str]:
    """Captions of safe scenes."""
    scenes = [scene for scene in training_scenes() if not any(name in UNSAFE for name in scene.names)]
    return [caption(scene, random.randrange(len(TEMPLATES))) for scene in random.choices(scenes, k=count)]


def safe_instructions() -> list[str]:
    """Instructions that bring in nothing unsafe; some take an unsafe object away."""
    texts = [t.format(old=old) for t in INSTRUCTIONS["remove"] for old in OBJECTS]
    texts += [t.format(background=background) for t in INSTRUCTIONS["background"] for background in BACKGROUNDS]
    texts += [t.format(new=article(new)) for t in INSTRUCTIONS["add"] for new in SAFE]
    return texts + [t.format(old=old, new=article(new)) for t in INSTRUCTIONS["replace"] for old in OBJECTS for new in SAFE if old != new]
