"""Pairs of unsafe prompts and their safe twins, for banks; from the training split, in plain names only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from random import Random

from ..bank import Pair
from .captions import INSTRUCTIONS, TEMPLATES, caption
from .scenes import Scene
from .world import BACKGROUNDS, DOMAINS, FUNCTION_WORDS, OBJECTS, PROXIMAL, SAFE, STYLES, TWINS, UNSAFE, article, domain_of

PLAIN_STYLE = "the scene"
"""What takes the place of a style in a safe twin: as many words, which say nothing."""
LONGEST = 12
"""Words of a caption, at most, if it is to be read whole."""


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


def twins(names: tuple[str, ...], unsafe: Collection[str] = UNSAFE) -> tuple[str, ...]:
    """Each unsafe object's safe twin; should that be there already, another safe object."""
    result: list[str] = []
    for name in names:
        twin = TWINS[name] if name in unsafe else name
        taken = {*result, *(other for other in names if other not in unsafe)} if name in unsafe else set(result)
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


def concept_pairs(random: Random, concept: str, count: int) -> list[Pair]:
    """Pairs of one concept: a domain, a single unsafe object, or a style; the members have the same number of words.

    Raises:
        ValueError: if there is no such concept.
    """
    if concept in STYLES:
        scenes = [scene for scene in training_scenes() if scene.style == concept]
        texts = [caption(scene, template) for scene in scenes for template in range(len(TEMPLATES))]
        return [Pair(text, text.replace(concept, PLAIN_STYLE), concept) for text in random.sample(texts, min(count, len(texts)))]
    objects = DOMAINS.get(concept, (concept,))
    if not set(objects) <= set(UNSAFE):
        raise ValueError(f"the testbed has no concept {concept!r}; there are {', '.join([*DOMAINS, *UNSAFE, *STYLES])}")
    scenes = [scene for scene in training_scenes() if scene.style is None and set(objects) & set(scene.names)]
    pairs = []
    for scene in random.sample(scenes, min(count, len(scenes))):
        template = random.randrange(len(TEMPLATES))
        twin = replace(scene, objects=twins(scene.names, objects))
        pairs.append(Pair(caption(scene, template), caption(twin, template), concept))
    return pairs


def neighbours(random: Random, concept: str, count: int) -> list[str]:
    """Captions that do not show a concept, though they may show another one: half of them are safe altogether."""
    objects = set(DOMAINS.get(concept, (concept,)))
    scenes = [scene for scene in training_scenes() if not objects & set(scene.names) and scene.style != concept]
    harmless = [scene for scene in scenes if not set(scene.names) & set(UNSAFE)]
    near = {name for domain, names in PROXIMAL.items() if objects & set(DOMAINS[domain]) for name in names}
    pools = (scenes, harmless, [scene for scene in harmless if near & set(scene.names)] or harmless)
    return [caption(random.choice(random.choice(pools)), random.randrange(len(TEMPLATES))) for _ in range(count)]


def disturbed(random: Random, pair: Pair) -> Pair:
    """The same pair in odd words: some that say nothing are added, dropped or repeated, at the same places in both members."""
    members = [pair.unsafe.split(), pair.safe.split()]
    for place in reversed(range(len(members[0]))):
        if members[0][place] != members[1][place]:
            continue
        chance = random.random()
        if chance < 0.2 and members[0][place].strip(",:") in FUNCTION_WORDS:
            for words in members:
                del words[place]
        elif chance < 0.4 and len(members[0]) < LONGEST:
            extra = random.choice(FUNCTION_WORDS[:9])
            for words in members:
                words.insert(place, extra)
    return Pair(" ".join(members[0]), " ".join(members[1]), pair.category)


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
